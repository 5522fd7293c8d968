"""Damages files as disks, networks and people do, for tests of many broken files."""

import random


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Returns a file with one to four damages: flipped bits, other bytes, cuts, holes and doubled parts."""
    broken = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randrange(len(broken) + 1)
        length = rng.choice((1, 2, 8, 600))
        match rng.randrange(6):
            case 0 if broken:
                broken[place % len(broken)] ^= 1 << rng.randrange(8)
            case 1:
                broken[place : place + length] = rng.randbytes(length)
            case 2:
                broken[place : place + length] = rng.choice((b"\0", b"\xff", b"7")) * length
            case 3:
                del broken[place : place + length]
            case 4:
                del broken[place:]
            case _:
                start = rng.randrange(len(broken) + 1)
                broken[place:place] = broken[start : start + length]
    return bytes(broken)
