import google_crc32c
import ml_dtypes
import numpy as np
import pytest

from richhf_jax import checksums


def test_bytes_have_the_published_check_value():
    assert checksums.of_bytes(b"123456789") == "e3069283"
    assert checksums.of_bytes(b"") == "00000000"


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint8, np.bool_, ml_dtypes.bfloat16])
def test_an_array_has_the_checksum_of_its_bytes(dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    assert checksums.of_array(array) == f"{google_crc32c.value(array.tobytes()):08x}"


def test_layout_in_memory_does_not_matter():
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert checksums.of_array(np.asfortranarray(array)) == checksums.of_array(array)
    assert checksums.of_array(array.astype(">f4")) == checksums.of_array(array)
    assert checksums.of_array(array.T) != checksums.of_array(array)


def test_scalars_and_empty_arrays():
    assert checksums.of_array(np.float32(1).reshape(())) == checksums.of_bytes(np.float32(1).tobytes())
    assert checksums.of_array(np.zeros((0, 3), np.float32)) == "00000000"


def test_each_flipped_bit_is_seen():
    array = np.linspace(0, 1, 50, dtype=np.float32)
    flipped = np.repeat(array[None], array.nbytes * 8, 0)
    bits = flipped.view(np.uint8)
    for number in range(len(bits)):
        bits[number, number // 8] ^= 1 << number % 8
    assert checksums.of_array(array) not in {checksums.of_array(row) for row in flipped}
