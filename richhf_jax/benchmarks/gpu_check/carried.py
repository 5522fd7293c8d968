"""Packs compiled programs into a few files of limited size, for the next run on another machine."""

import contextlib
import io
import os
import pathlib
import tarfile
import time

MIB = 2**20
# Folder of PyTorch's kernels in the cache.
TORCH = "torch"
_PART = "programs.tar."
_PART_BYTES = 15 * MIB
# Results of autotuning and the like, which are never left out before a program.
_SMALL = MIB
# Seconds since its last change, after which a file is whole.
_SETTLED_SECONDS = 0.3


def pack(cache: pathlib.Path, out: pathlib.Path, most: int) -> list[str]:
    """Packs a cache folder, which other processes may be writing to.

    Small files come first, then the oldest. PyTorch's kernels come last: they compile faster.

    Args:
      cache: the folder with the programs.
      out: a folder, in which older parts are replaced.
      most: bytes of all parts together.

    Returns:
      Descriptions of the files for which there was no room.
    """
    content, left_out = io.BytesIO(), []
    room = most - tarfile.RECORDSIZE  # The end is a record of zeros at most.
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path, size in _files(cache):
            needed = size + 2 * tarfile.BLOCKSIZE  # Its header, and the rest of its last block.
            if needed > room:
                left_out.append(f"{path.name} ({size / MIB:.1f} MiB)")
                continue
            with contextlib.suppress(FileNotFoundError):  # It was there only for a moment.
                tar.add(path, path.relative_to(cache).as_posix(), recursive=False)
                room -= needed
    view = content.getbuffer()
    parts = [view[i : i + _PART_BYTES] for i in range(0, len(view), _PART_BYTES)]
    names = [f"{_PART}{number:02}" for number in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        (out / f"{name}.new").write_bytes(part)
    for name in names:
        os.replace(out / f"{name}.new", out / name)
    for path in out.glob(f"{_PART}*"):
        if path.name not in names:
            path.unlink()
    return left_out


def _files(cache: pathlib.Path) -> list[tuple[pathlib.Path, int]]:
    """Lists the files that nobody is writing, with their sizes."""
    found = []
    for path in cache.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            age = time.time() - status.st_mtime
            if path.is_file() and not path.name.startswith(_PART) and age > _SETTLED_SECONDS:
                is_last = path.is_relative_to(cache / TORCH)
                found.append((path, status.st_size, (is_last, status.st_size > _SMALL, status.st_mtime)))
    return [(path, size) for path, size, _ in sorted(found, key=lambda item: item[2])]


def unpack(folder: pathlib.Path) -> int:
    """Unpacks the parts that `pack` wrote, in the same folder. Returns the number of files.

    Of parts that don't belong together (their run was killed as it wrote them) it takes what can be read.
    """
    content = b"".join(path.read_bytes() for path in sorted(folder.glob(f"{_PART}??")))
    count, last = 0, None
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for member in tar:
                last = folder / member.name
                tar.extract(member, folder, filter="data")
                count, last = count + 1, None
    except tarfile.TarError:
        if last:
            last.unlink(missing_ok=True)  # JAX would never replace a program that it can't read.
    return count
