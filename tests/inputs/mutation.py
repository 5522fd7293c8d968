"""Damages files as disks, networks and attackers do, the same way in every run."""

import random
from collections.abc import Iterator, Sequence

SEED = 17


def mutants(files: Sequence[bytes], count: int) -> Iterator[bytes]:
    """Yields files with one to three changes: flipped bits, cuts, inserts, repeated or swapped blocks."""
    rng = random.Random(SEED)
    for number in range(count):
        data = bytearray(files[number % len(files)])
        for _ in range(rng.randint(1, 3)):
            rng.choice(_CHANGES)(data, rng)
        yield bytes(data)


def _block(data: bytearray, rng: random.Random) -> slice:
    start = rng.randint(0, len(data))
    return slice(start, start + rng.randint(1, 16))


def _flip(data: bytearray, rng: random.Random) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _set(data: bytearray, rng: random.Random) -> None:
    if data:
        data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, ord("\n"), ord('"'), ord(",")))


def _overwrite(data: bytearray, rng: random.Random) -> None:
    start = rng.randint(0, len(data))
    data[start : start + 4] = rng.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\x20\0"))


def _cut_end(data: bytearray, rng: random.Random) -> None:
    del data[rng.randint(0, len(data)) :]


def _cut(data: bytearray, rng: random.Random) -> None:
    del data[_block(data, rng)]


def _insert(data: bytearray, rng: random.Random) -> None:
    start = rng.randint(0, len(data))
    data[start:start] = rng.randbytes(rng.randint(1, 16))


def _repeat(data: bytearray, rng: random.Random) -> None:
    start = rng.randint(0, len(data))
    data[start:start] = data[_block(data, rng)] * rng.randint(1, 4)


def _swap(data: bytearray, rng: random.Random) -> None:
    size = rng.randint(1, 16)
    first, second = (rng.randint(0, max(0, len(data) - size)) for _ in range(2))
    data[first : first + size], data[second : second + size] = (
        data[second : second + size],
        data[first : first + size],
    )


_CHANGES = (_flip, _set, _overwrite, _cut_end, _cut, _insert, _repeat, _swap)
