"""Reads files of a local folder or any fsspec URL in ranges, and tries again where the network fails."""

import io
import posixpath
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import fsspec

from richhf_jax import errors

# Tries of one read, and seconds after the first one; each further wait is twice as long (15 s in all).
ATTEMPTS = 5
FIRST_WAIT = 1.0

_Result = TypeVar("_Result")


class UnreadableError(errors.UserError):
    """A file is gone, forbidden or encrypted: trying again wouldn't help."""


def _patiently(path: str, action: Callable[[], _Result]) -> _Result:
    """Calls `action`, and calls it again if it fails for a reason that may pass."""
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UnreadableError(f"{path}: no such file or folder") from error
        except PermissionError as error:
            raise UnreadableError(f"{path}: reading it isn't allowed ({error})") from error
        except RuntimeError as error:  # zipfile's, where a password or another way to unpack is needed.
            raise UnreadableError(f"{path}: {error}") from error
        except Exception as error:  # Each kind of file system has exceptions of its own.
            if attempt == ATTEMPTS - 1:
                raise errors.UserError(
                    f"{path}: reading failed {ATTEMPTS} times, the last time with\n"
                    f"    {type(error).__name__}: {error}\n"
                    "Give the same command again: it continues behind the last finished shard."
                ) from error
            time.sleep(FIRST_WAIT * 2**attempt)
    raise AssertionError("unreachable")


class _PatientFile(io.RawIOBase):
    """Readable file that tries failed reads again."""

    def __init__(self, path: str, file):
        self._path, self._file = path, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        start = self._file.tell()
        return _patiently(self._path, lambda: self._read_at(start, size))

    def _read_at(self, start: int, size: int) -> bytes:
        self._file.seek(start)
        return self._file.read(size)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class Folder:
    """A folder, or a single file, and everything under it.

    Attributes:
      path: the path as given, e.g. 'hf://datasets/owner/name/data'.
    """

    def __init__(self, path: str):
        """Finds what reads the path.

        Raises:
          errors.UserError: there is no such kind of path, or what reads it isn't installed.
        """
        self.path = path
        try:
            self._fs, self._root = fsspec.core.url_to_fs(path)
        except (ImportError, ValueError) as error:
            raise errors.UserError(f"{path}: {error}") from error

    def __str__(self) -> str:
        """Returns the full path, the same for all ways to write it; for `zip://::FILE` what was given."""
        return self.path if "::" in self.path else self._fs.unstrip_protocol(self._root)

    def files(self, suffixes: Sequence[str]) -> dict[str, int]:
        """Lists files with one of the suffixes, in any case: name below the folder -> bytes (0: unknown).

        The order is by name. Pipes and devices are left out.
        """
        found = _patiently(self.path, lambda: self._fs.find(self._root, detail=True))
        names = {
            posixpath.basename(path) if path == self._root else self._below(path): entry
            for path, entry in found.items()
        }
        return {
            name: entry["size"] or 0
            for name, entry in sorted(names.items())
            if name.lower().endswith(tuple(suffixes)) and entry["type"] == "file"
        }

    def _below(self, path: str) -> str:
        return posixpath.relpath(path, self._root) if self._root else path

    def read(self, name: str, most: int) -> bytes:
        """Reads a file. Raises ValueError where it has more than `most` bytes."""
        with self.open(name) as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise ValueError(f"more than {most} bytes")
        return data

    def where(self, name: str) -> str:
        """Returns a file's name for messages."""
        return name if self._is_file(name) else f"{self.path.rstrip('/')}/{name}"

    def _is_file(self, name: str) -> bool:
        return posixpath.basename(self._root) == name

    def open(self, name: str) -> io.RawIOBase:
        """Opens a file for reading. It reads exactly what is asked for, nothing ahead."""
        path = self._root if self._is_file(name) else posixpath.join(self._root, name)
        where = self.where(name)
        return _PatientFile(where, _patiently(where, lambda: self._fs.open(path, "rb", cache_type="none")))
