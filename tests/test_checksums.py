import itertools
import json

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


@pytest.mark.parametrize("shape", [(), (1,), (7,), (6, 4), (5, 3, 4), (2, 3, 4, 6), (1, 1, 5), (0, 3)])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8, ml_dtypes.bfloat16])
def test_pieces_have_the_checksum_of_the_whole(rng, shape, dtype):
    array = rng.integers(0, 100, shape).astype(dtype)
    pieces = checksums.Pieces(shape, array.itemsize)
    for _ in range(5):
        cuts = [sorted({0, size, *rng.integers(0, size + 1, rng.integers(0, 3)).tolist()}) for size in shape]
        joined = 0
        for index in itertools.product(*(map(slice, cut, cut[1:]) for cut in cuts)):
            joined ^= pieces.contribution(array[index], index)
        assert pieces.checksum(joined) == checksums.of_array(array)


def test_a_piece_in_another_place_is_another_array():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    pieces = checksums.Pieces(array.shape, 4)
    rows = [pieces.contribution(array[i : i + 1], (slice(j, j + 1), slice(4))) for i, j in ((1, 0), (0, 1))]
    last = pieces.contribution(array[2:], (slice(2, 3), slice(None)))
    assert pieces.checksum(rows[0] ^ rows[1] ^ last) == checksums.of_array(array[[1, 0, 2]])


def test_json_has_one_checksum_in_every_layout():
    content = {"b": [1, 2.5, None], "a": {"é": True}}
    assert checksums.of_json(json.loads(json.dumps(content, indent=3))) == checksums.of_json(content)
    assert checksums.of_json(content | {"b": [1, 2.5]}) != checksums.of_json(content)
