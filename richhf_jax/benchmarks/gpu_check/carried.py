"""Packs compiled programs into a few files of limited size, for the next run on another machine."""

import contextlib
import io
import os
import pathlib
import tarfile
import time

from richhf_jax import errors

MIB = 2**20
# Folder of programs in the one that --cache names: nothing else is packed.
PROGRAMS = "programs"
# Folder of PyTorch's kernels among them.
TORCH = "torch"
_PART = "programs.tar."
_PART_BYTES = 15 * MIB
# Two digits number the parts.
MOST_MIB = 100 * _PART_BYTES // MIB
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
    kind = tarfile.USTAR_FORMAT
    with tarfile.open(fileobj=content, mode="w", format=kind, dereference=True) as tar:
        for path, size in _files(cache):
            needed = size + 2 * tarfile.BLOCKSIZE  # Its header, and the rest of its last block.
            if needed > room:
                left_out.append(f"{path.name} ({size / MIB:.1f} MiB)")
                continue
            with contextlib.suppress(FileNotFoundError):  # It was there only for a moment.
                tar.add(path, path.relative_to(cache).as_posix(), recursive=False)
                room -= needed
    view = content.getbuffer()
    pieces = [view[i : i + _PART_BYTES] for i in range(0, len(view), _PART_BYTES)]
    names = [f"{_PART}{number:02}" for number in range(len(pieces))]
    for name, piece in zip(names, pieces, strict=True):
        (out / f"{name}.new").write_bytes(piece)
    for name in names:
        os.replace(out / f"{name}.new", out / name)
    for path in parts(out):
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
            if path.is_file() and age > _SETTLED_SECONDS:
                is_last = path.is_relative_to(cache / TORCH)
                found.append((path, status.st_size, (is_last, status.st_size > _SMALL, status.st_mtime)))
    return [(path, size) for path, size, _ in sorted(found, key=lambda item: item[2])]


def parts(folder: pathlib.Path) -> list[pathlib.Path]:
    """Lists the parts that `pack` wrote into a folder."""
    return sorted(folder.glob(f"{_PART}[0-9][0-9]"))


def unpack(folder: pathlib.Path, cache: pathlib.Path) -> int:
    """Unpacks the parts of a folder into a cache folder, and returns the number of new files.

    Files that are there already stay as they are. Of parts that don't belong together (their run was killed
    as it wrote them) it takes what is whole: JAX would never replace a program that it can't read.

    Raises:
      errors.UserError: a part can't be read, a file can't be written, or the archive isn't of `pack`.
    """
    found: dict[str, bytes] = {}
    count = 0
    try:
        content = b"".join(path.read_bytes() for path in parts(folder))
        with contextlib.suppress(tarfile.TarError), tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for member in tar:
                name = pathlib.PurePosixPath(member.name)
                if not member.isreg() or name.is_absolute() or ".." in name.parts:
                    raise errors.UserError(
                        f"{parts(folder)[0]}: its member {member.name!r} is no file below the folder, so"
                        " this archive is none of the check's; remove it"
                    )
                if file := tar.extractfile(member):
                    found[member.name] = file.read()
        for name, program in found.items():
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError), (cache / name).open("xb") as file:
                file.write(program)
                count += 1
    except OSError as error:
        raise errors.UserError(f"can't unpack programs: {error.filename}: {error.strerror}") from error
    return count
