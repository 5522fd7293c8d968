"""Reads the files in a tar one after the other, plain or gzipped, of any storage and in bounded memory."""

import dataclasses
import gzip
import io
import itertools
import os
import tarfile
from collections.abc import Iterator
from typing import IO, Any, cast

from richhf_jax.inputs.record import IMAGE_EXTENSIONS, MAX_IMAGE_BYTES, MAX_ROW, MAX_TEXT_BYTES

# Most bytes of files with text, by extension; of all others MAX_IMAGE_BYTES.
_TEXTS = {
    **dict.fromkeys((".txt", ".text", ".caption", ".language", ".lang"), MAX_TEXT_BYTES),
    ".json": MAX_ROW,
}
# Types of headers that aren't files but tell how the tar was packed: GNU's label of the volume, lists of
# folders (incremental) and long names of old, Solaris' access rights, star's inodes.
_BOOKKEEPING = (b"V", b"D", b"N", b"A", b"I")
# Most bytes of an extended header (a long name, times, ...), and most entries of headers for all members.
_MAX_HEADER, _MAX_GLOBAL = 1 << 20, 100
# Most bytes of a gzipped tar that are kept because hard links refer to them.
_MAX_KEPT = 1 << 28
# Most zeros behind the mark of the end that are looked at: packers fill up a block of some KB.
_MAX_PADDING = 1 << 24
_GZIP = b"\x1f\x8b"
_OTHER_COMPRESSION = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}


class TarError(Exception):
    """A tar is cut off or broken, and what is behind its last member is lost. The message says why."""


class StorageError(Exception):
    """Reading fails, though the content may be good: try again. A file given to `Tar` may raise it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar.

    Attributes:
      name: its path, without "./" before it.
      offset, size: place of its content, in bytes of the tar when it is unpacked. A hard link's content is
        that of the file that it refers to.
      problem: why it has no content, to be read behind the name ("is a symbolic link ..."); else ''.
    """

    name: str
    offset: int = 0
    size: int = 0
    problem: str = ""


class Tar:
    """The files of a tar, in its order; folders, macOS's '._a.jpg' and hidden files are left out.

    A hidden image is there, with a problem: it may be one of a pair.

    Only hard links need a file that can seek back: it is then read up to three times.
    """

    def __init__(self, file: io.BufferedReader):
        """Takes a file at its start. It may be gzipped, and may raise StorageError when it is read."""
        start = file.peek(8)
        other = (name for magic, name in _OTHER_COMPRESSION.items() if start.startswith(magic))
        self._compression = next(other, "")
        self._rewinds = file.seekable()
        self._gzipped = start.startswith(_GZIP)
        self._file: Any = file
        if self._gzipped:
            self._file = gzip.GzipFile(fileobj=file)
        elif not self._rewinds:
            self._file = _Forward(file)
        # Names that hard links refer to (None: no link was met), the last file of each, and contents.
        self._linked: set[str] | None = None
        self._targets: dict[str, Member] = {}
        self._kept: dict[int, bytes] = {}

    def __iter__(self) -> Iterator[Member]:
        """Yields the files. Raises TarError where the rest is lost, and StorageError."""
        if self._compression:
            raise TarError(f"compressed by {self._compression}; unpack it first")
        try:
            for info in self._headers():
                if info.islnk() and self._linked is None:
                    self._find_targets(info.offset)
                member = self._noted(info)
                if not info.isdir() and info.type not in _BOOKKEEPING and not _is_left_out(member.name):
                    yield _judged(member)
        except (StorageError, TarError):
            raise
        except Exception as error:  # tarfile raises what it likes at garbled headers.
            raise TarError(str(error) or type(error).__name__) from error

    def read(self, member: Member) -> bytes:
        """Returns the content of the file that was yielded last.

        Raises:
          TarError: the tar ends within it, or is broken there.
          StorageError: see `__init__`.
        """
        if member.offset in self._kept:
            return self._kept[member.offset]
        try:
            if self._file.tell() != member.offset:
                self._file.seek(member.offset)
            data = self._file.read(member.size)
        except StorageError:
            raise
        except Exception as error:
            raise TarError(str(error)) from error
        if len(data) < member.size:
            raise TarError("unexpected end of data")
        return data

    def _headers(self) -> Iterator[tarfile.TarInfo]:
        """Yields all members from the first one on, and checks the end. It raises what tarfile raises."""
        if self._file.tell():
            self._file.seek(0)
        with tarfile.open(fileobj=cast(IO[bytes], _Headers(self._file)), mode="r:", tarinfo=_Info) as tar:
            end = 0
            while (info := tar.next()) is not None:
                # Else it keeps all in memory.
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
                # A negative size would lead to an endless loop.
                if info.size < 0 or tar.offset <= end or len(tar.pax_headers) > _MAX_GLOBAL:
                    raise TarError("garbled header")
                if self._gzipped and info.size > MAX_IMAGE_BYTES:  # Passing it may take hours.
                    raise TarError(
                        f"{info.name} {_too_large(info.size, MAX_IMAGE_BYTES)} in a compressed tar"
                    )
                end = tar.offset
                yield info
            self._check_end(tar.offset)

    def _check_end(self, offset: int) -> None:
        """Checks for the mark of the end: tarfile takes a missing or garbled header for it, too."""
        self._file.seek(offset)
        block = self._file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            raise TarError("no mark of the end")
        if block.strip(b"\0"):
            raise TarError("garbled header (no mark of the end)")
        while self._file.tell() < offset + _MAX_PADDING and (chunk := self._file.read(1 << 20)):
            if chunk.strip(b"\0"):
                raise TarError("something follows the mark of the end (joined tars?)")

    def _find_targets(self, end: int) -> None:
        """Notes which names all hard links refer to, and the files of these names before the byte `end`."""
        self._linked = set()
        if not self._rewinds:
            return
        try:
            self._linked.update(_short(info.linkname) for info in self._headers() if info.islnk())
        except StorageError:
            raise
        except Exception:  # It is told when the members behind it are wanted.
            pass
        for info in itertools.takewhile(lambda info: info.offset < end, self._headers()):
            self._noted(info)

    def _noted(self, info: tarfile.TarInfo) -> Member:
        """Makes the member of a header, and notes it if hard links refer to its name."""
        member = self._member(info)
        if self._linked and member.name in self._linked:
            self._targets[member.name] = member
            kept = sum(map(len, self._kept.values()))
            if self._gzipped and info.isreg() and not member.problem and kept + member.size <= _MAX_KEPT:
                self._kept[member.offset] = self.read(member)
        return member

    def _member(self, info: tarfile.TarInfo) -> Member:
        name = _short(info.name)
        if info.islnk():
            return dataclasses.replace(self._target(_short(info.linkname)), name=name)
        problem = ""
        if info.issym():
            problem = f"is a symbolic link to {info.linkname}; pack the tar with `tar --dereference`"
        elif info.issparse():
            problem = "is a sparse file; pack the tar without --sparse"
        elif not info.isreg():
            problem = "is no regular file"
        elif info.size > MAX_IMAGE_BYTES:
            problem = _too_large(info.size, MAX_IMAGE_BYTES)
        return Member(name, info.offset_data, info.size, problem)

    def _target(self, name: str) -> Member:
        """Returns the file that a hard link refers to, or a member with the problem."""
        target = self._targets.get(name)
        if not self._rewinds:
            problem = "can't be read again; copy the tar first"
        elif target is None:
            problem = "isn't before it in the tar"
        elif not target.problem and self._gzipped and target.offset not in self._kept:
            problem = f"isn't among the first {_MAX_KEPT} bytes that are linked; `gunzip` the tar"
        elif target.problem:
            problem = target.problem
        else:
            return target
        return Member(name, problem=f"is a hard link to {name}, which {problem}")


# Newer patch releases of Python read a block by another method.
_READ = "_frombuf" if hasattr(tarfile.TarInfo, "_frombuf") else "frombuf"


class _Info(tarfile.TarInfo):
    """Header of a member with its right name: GNU's incremental tars have times where POSIX has a prefix."""

    @classmethod
    def read(cls, buf: bytes | bytearray, encoding: str, errors: str, **options: bool) -> "_Info":
        """Makes it of a block, as tarfile does, which takes the times for a prefix of the name."""
        info = getattr(super(), _READ)(buf, encoding, errors, **options)
        times = buf[345:500].partition(b"\0")[0].decode(encoding, errors)
        if times and buf[257:265] == tarfile.GNU_MAGIC:
            info.name = info.name.removeprefix(f"{times}/")
        return info


setattr(_Info, _READ, _Info.read)


class _Forward:
    """File that can't seek: it reads what it passes over."""

    def __init__(self, file: io.BufferedReader):
        self._file, self._at = file, 0

    def tell(self) -> int:
        return self._at

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._at += len(data)
        return data

    def seek(self, offset: int) -> None:
        while self._at < offset and self.read(min(offset - self._at, 1 << 20)):
            pass


class _Headers:
    """File for tarfile, which reads headers only: it refuses to read as much as a garbled one may claim."""

    def __init__(self, file: Any):
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def _short(name: str) -> str:
    return name.removeprefix("./")


def _judged(member: Member) -> Member:
    """Returns a file with the problem that its name makes of its size or place, if it has none yet."""
    most = _TEXTS.get(_extension(member.name), MAX_IMAGE_BYTES)
    problem = member.problem
    if not problem and _is_hidden(member.name):
        problem = "is hidden, as its name begins with a dot; rename it"
    if not problem and member.size > most:
        problem = _too_large(member.size, most)
    return dataclasses.replace(member, problem=problem) if problem != member.problem else member


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _is_hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")


def _is_left_out(name: str) -> bool:
    """Tells whether a file is macOS's attributes of another ("._a.jpg"), or hidden and no image."""
    is_image = _extension(name) in IMAGE_EXTENSIONS
    return _is_hidden(name) and (name.rpartition("/")[2].startswith("._") or not is_image)


def _too_large(size: int, most: int) -> str:
    return f"has {size} bytes, and at most {most} are taken"
