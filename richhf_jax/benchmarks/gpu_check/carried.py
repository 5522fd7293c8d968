"""Packs compiled programs into a few files of limited size, which the next run on another machine can take."""

import io
import os
import pathlib
import tarfile

MIB = 2**20
_PART = "programs.tar."
_PART_BYTES = 15 * MIB
# Results of autotuning and the like, which are never left out before a program.
_SMALL = MIB


def pack(cache: pathlib.Path, out: pathlib.Path, most: int) -> list[str]:
    """Packs a cache folder.

    Small files come first, then the oldest.

    Args:
      cache: the folder with the programs.
      out: a folder, in which older parts are replaced.
      most: bytes of all parts together.

    Returns:
      Descriptions of the files for which there was no room.
    """
    found = [(path, path.stat()) for path in cache.rglob("*") if path.is_file() and not _is_part(path)]
    found.sort(key=lambda item: (item[1].st_size > _SMALL, item[1].st_mtime))
    content, left_out = io.BytesIO(), []
    # Each file has a header; the end has two blocks.
    room = most - 20 * tarfile.BLOCKSIZE
    with tarfile.open(fileobj=content, mode="w") as tar:
        for path, status in found:
            room_needed = status.st_size + 4 * tarfile.BLOCKSIZE
            if room_needed > room:
                left_out.append(f"{path.name} ({status.st_size / MIB:.1f} MiB)")
                continue
            room -= room_needed
            tar.add(path, path.relative_to(cache).as_posix(), recursive=False)
    view = content.getbuffer()
    parts = {
        f"{_PART}{i:02}": view[i * _PART_BYTES :][:_PART_BYTES] for i in range(-(-len(view) // _PART_BYTES))
    }
    for name, part in parts.items():
        (out / f"{name}.new").write_bytes(part)
    for name in parts:
        os.replace(out / f"{name}.new", out / name)
    for path in out.glob(f"{_PART}*"):
        if path.name not in parts:
            path.unlink()
    return left_out


def unpack(folder: pathlib.Path) -> int:
    """Unpacks the parts that `pack` wrote, in the same folder. Returns the number of files.

    Of parts that don't belong together (their run was killed as it wrote them) it takes what can be read.
    """
    content = b"".join(path.read_bytes() for path in sorted(folder.glob(f"{_PART}*")))
    count = 0
    if content:
        try:
            with tarfile.open(fileobj=io.BytesIO(content)) as tar:
                for member in tar:
                    tar.extract(member, folder, filter="data")
                    count += 1
        except tarfile.TarError:
            pass
    return count


def _is_part(path: pathlib.Path) -> bool:
    return path.name.startswith(_PART)
