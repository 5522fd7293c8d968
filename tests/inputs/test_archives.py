"""Tests reading of tars as people have them, whole and broken."""

import tarfile
import tracemalloc

import pytest

from richhf_jax import inputs
from tests.inputs.reading import loaded, read, write_tar

PAIRS = [
    ("./a.jpg", b"A"),
    ("./a.txt", b" a cat\n"),
    ("in.1/b.TXT", b"\xef\xbb\xbfb"),
    ("in.1/b.PNG", b"B"),
    (f"{'long' * 50}/猫.webp", b"C"),
    (f"{'long' * 50}/猫.txt", "猫".encode()),
]
LOADED = {"a": (b"A", "a cat"), "in.1/b": (b"B", "b"), f"{'long' * 50}/猫": (b"C", "猫")}


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_tar(tmp_path, form):
    others = [("a.json", b"{}"), ("._a.jpg", b""), (".jpg", b""), (".b/._c.txt", b"")]
    write_tar(tmp_path / "t.tar", [*PAIRS[:1], *others, *PAIRS[1:]], format=form)
    with tarfile.open(tmp_path / "t.tar", "a") as tar:
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    assert list(read(tmp_path / "t.tar").items()) == list(LOADED.items())


def test_pairs_of_a_tar_need_not_be_adjacent(tmp_path):
    shuffled = [PAIRS[index] for index in (5, 0, 2, 1, 3, 4)]
    write_tar(tmp_path / "t.tar", shuffled)
    found = read(tmp_path / "t.tar")
    assert found == LOADED
    assert list(found)[:2] == ["a", "in.1/b"]  # In the order of their second halves.


def test_halves_in_a_tar(tmp_path):
    members = [
        ("a.jpg", b"A"),
        ("b.txt", b"b"),
        ("c.jpg", b"C"),
        ("c.txt", b" "),
        ("d.jpg", b"D"),
        ("d.txt", b"\xff"),
        ("e.jpg", b"E"),
        ("e.txt", b"e"),
    ]
    write_tar(tmp_path / "t.tar", members)
    tar = f"{tmp_path}/t.tar"
    assert list(read(tar).items()) == [
        ("c", f"{tar}, c.txt: the prompt is empty"),
        ("d", f"{tar}, d.txt: the prompt isn't UTF-8; save it as UTF-8"),
        ("e", (b"E", "e")),
        ("a", f"{tar}, a: a.jpg has no .txt with its prompt beside it in the tar"),
        ("b", f"{tar}, b: b.txt has no image beside it in the tar"),
    ]


def test_a_hidden_pair_in_a_tar_is_told(tmp_path):
    write_tar(tmp_path / "t.tar", [(".a.jpg", b"A"), (".a.txt", b"a"), ("._b.jpg", b""), *PAIRS[:2]])
    assert read(tmp_path / "t.tar") == {
        "a": LOADED["a"],
        ".a": f"{tmp_path}/t.tar, .a: .a.jpg is hidden, as its name begins with a dot; rename it",
    }


def test_a_key_that_comes_twice_in_a_tar(tmp_path):
    write_tar(tmp_path / "t.tar", [("a.jpg", b"A"), ("a.png", b"P"), ("a.txt", b"a")])
    records = list(inputs.Inputs([str(tmp_path / "t.tar")]))
    assert [(record.id, loaded(record)) for record in records] == [
        ("a", f"{tmp_path}/t.tar, a: both .jpg and .png are there"),
        ("a", (b"A", "a")),
    ]
    write_tar(tmp_path / "t.tar", [("a.jpg", b"A"), ("a.txt", b"a"), ("a.jpg", b"P"), ("b.jpg", b"B")])
    first, again, other = inputs.Inputs([str(tmp_path / "t.tar")])
    assert loaded(first) == (b"A", "a")
    assert loaded(again) == f"{tmp_path}/t.tar, a: a.jpg is there twice"
    assert loaded(other) == f"{tmp_path}/t.tar, b: b.jpg has no .txt with its prompt beside it in the tar"


BLOCK = tarfile.BLOCKSIZE
TWO_PAIRS = [("a.jpg", b"A"), ("a.txt", b"a"), ("b.txt", b"b"), ("b.jpg", b"B" * 600)]
BEFORE_END = 9 * BLOCK  # Four headers, five blocks of content.


def garbled(data, offset):
    return (
        data[:offset] + bytes(byte ^ 0xFF for byte in data[offset : offset + BLOCK]) + data[offset + BLOCK :]
    )


def negative_size(data):
    """Gives the third header size -1024 (base 256) and a right checksum: a reader would go in circles."""
    header = bytearray(data[4 * BLOCK : 5 * BLOCK])
    header[124:136] = (-1024).to_bytes(12, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[: 4 * BLOCK] + bytes(header) + data[5 * BLOCK :]


@pytest.mark.parametrize(
    ("damage", "whole", "reason"),
    [
        (lambda data: data[: 2 * BLOCK], [], "no mark"),
        (lambda data: data[: 4 * BLOCK], ["a"], "no mark"),
        (lambda data: data[: 4 * BLOCK + 100], ["a"], "no mark"),
        (lambda data: data[: 8 * BLOCK], ["a"], "unexpected end of data"),
        (lambda data: data[:BEFORE_END], ["a", "b"], "no mark"),
        (lambda data: garbled(data, 0), [], "bad checksum|invalid header"),
        (lambda data: garbled(data, 4 * BLOCK), ["a"], "no mark"),
        (lambda data: data + data, ["a", "b"], "something follows"),
        (lambda data: b"", [], "empty file"),
        (lambda data: b"<html>not found</html>", [], "truncated header"),
        (negative_size, ["a"], "garbled header"),
    ],
)
def test_a_broken_tar_gives_what_is_readable(tmp_path, damage, whole, reason):
    path = tmp_path / "t.tar"
    write_tar(path, TWO_PAIRS)
    path.write_bytes(damage(path.read_bytes()))
    found = read(path)
    *_, (last, message) = found.items()
    assert last == "t.tar:end"
    assert message.startswith(f"{path}: cut off or broken behind the last member found, the rest is lost: ")
    assert any(part in message for part in reason.split("|")), message
    assert [name for name, value in found.items() if isinstance(value, tuple)] == whole


def test_a_tar_that_is_cut_off_in_an_image(tmp_path):
    path = tmp_path / "t.tar"
    write_tar(path, TWO_PAIRS)
    path.write_bytes(path.read_bytes()[: 8 * BLOCK])
    assert read(path)["b"] == f"{path}, b: cut off, 512 of 600 bytes are there"


def test_a_tar_holds_no_more_than_the_halves(tmp_path):
    path = tmp_path / "t.tar"
    numbers = range(5_000)
    write_tar(
        path, [(f"{n:05}.{end}", b"x") for n in numbers for end in ("jpg", "txt")], format=tarfile.GNU_FORMAT
    )
    tracemalloc.start()
    try:
        assert sum(1 for _ in inputs.Inputs([str(path)])) == len(numbers)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_500_000  # Bytes of the block that is read last. tarfile's own list would take 10 MB.
