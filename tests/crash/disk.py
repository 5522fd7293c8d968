"""Records a command's writes below a folder, and builds the folder as a power cut could have left it.

A file's content is on the disk once it is synchronised (fsync, fdatasync), a name once its folder is; sync
does all. What becomes of the rest after a power cut depends on the file system. Four models:

    WHOLE   Everything is there: the disk was quick. This is also what SIGKILL leaves.
    SYNCED  Only what was synchronised is there.
    EXT4    As ext4 with data=ordered and delayed allocation. Names and truncations reach the disk in their
            order, all up to some moment; synchronising any file brings all of them so far. Of a file's new
            data only the first pages may be there, so a renamed file may be empty. A page that was written
            over is the old or the new one. (auto_da_alloc, which helps programs without fsync, is off.)
    POSIX   Whatever POSIX allows. Each name is changed or not, in any order, but a rename is one step. Of a
            file's data any pages may be there, and it may have its new size already: lost pages are zeros.

The recorder needs Linux on x86-64 and a C compiler.
"""

import dataclasses
import enum
import os
import pathlib
import platform
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence

# Relative path -> content of a file, target of a link, None for a folder.
Tree = Mapping[str, bytes | str | None]
WHOLE, SYNCED, EXT4, POSIX = MODELS = ("whole", "synced", "ext4", "posix")
PAGE = 4096
_HERE = pathlib.Path(__file__).parent
_HEADER = struct.Struct("<BBHHHQqqq")

_Kind = enum.IntEnum(
    "_Kind", "CREATE TRUNCATE WRITE RENAME LINK UNLINK MKDIR RMDIR SYMLINK CHMOD SYNC SYNC_ALL", start=0
)


class NoRecorderError(Exception):
    """The recorder can't be built here."""


@dataclasses.dataclass(frozen=True)
class Event:
    """A change, or a synchronisation; see recorder.c."""

    kind: int
    mode: int
    first: str
    second: str
    inode: int
    is_folder: bool
    offset: int
    data: bytes


@dataclasses.dataclass(eq=False)
class _File:
    """A file: its content when the recording began, and the changes since.

    A change is (time, new size) or (time, offset, data).
    """

    content: bytes = b""
    mode: int = 0o644
    changes: list[tuple] = dataclasses.field(default_factory=list)
    synced: int = 0  # Number of the changes that are on the disk.


@dataclasses.dataclass(eq=False)
class _Link:
    """A symbolic link."""

    target: str


@dataclasses.dataclass(eq=False)
class _Folder:
    """A folder, with its names as programs see them now."""

    mode: int = 0o755
    before: dict[str, "_Node"] = dataclasses.field(default_factory=dict)
    now: dict[str, "_Node"] = dataclasses.field(default_factory=dict)


_Node = _File | _Folder | _Link
# The folder of all paths that aren't recorded.
_OUTSIDE = _Folder()


@dataclasses.dataclass
class _Rename:
    """A change of names in one step: (folder, name) -> its file from now on, None if it is gone."""

    time: int
    names: dict[tuple[_Folder, str], _Node | None]
    synced: bool = False


def build_recorder(folder: pathlib.Path) -> pathlib.Path:
    """Compiles the recorder into a folder.

    Raises:
      NoRecorderError: there is no program `cc`, or the system isn't Linux on x86-64.
    """
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise NoRecorderError("power cuts can be tried on Linux on x86-64 only: the recorder knows no other")
    if shutil.which("cc") is None:
        raise NoRecorderError("the recorder needs a C compiler: install gcc or clang, so that `cc` is found")
    library = folder / "recorder.so"
    command = ["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(_HERE / "recorder.c")]
    subprocess.run(command, check=True)
    return library


class Record:
    """All changes that a command made below a folder."""

    def __init__(self, root: pathlib.Path, recorder: pathlib.Path):
        """Remembers the folder's present content.

        Args:
          root: a folder.
          recorder: the library from `build_recorder`.
        """
        self.root = root.resolve()
        self.recorder = recorder
        self._file = recorder.with_name(f"{root.name}.record")
        self._file.unlink(missing_ok=True)
        self._before = tree(self.root)
        self._inodes = {name: (self.root / name).lstat().st_ino for name in self._before}
        self.events: list[Event] = []

    def run(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        codes: Sequence[int] = (0,),
    ) -> str:
        """Runs a command that writes into the folder, and reads its events. Returns what it printed.

        Raises:
          AssertionError: it ended with another exit code, or the events don't explain the folder's content.
        """
        recording = {"LD_PRELOAD": self.recorder, "RECORDED_ROOT": self.root, "RECORD": self._file}
        environment = {
            **(environment or os.environ),
            **{name: str(place) for name, place in recording.items()},
        }
        result = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        assert result.returncode in codes, f"exit code {result.returncode}: {result.stdout[-3000:]}"
        self.events = list(_parse(self._file.read_bytes()))
        check = self.root.with_name(f"{self.root.name}.check")
        self.build(check, len(self.events), WHOLE, random.Random(0))
        lost = differences(tree(self.root), tree(check))
        shutil.rmtree(check)
        assert not lost, f"the recorder has missed writes: {lost[:5]}"
        return result.stdout

    def build(self, target: pathlib.Path, cut: int, model: str, rng: random.Random) -> None:
        """Makes a folder as a power cut could have left it.

        Args:
          target: the folder, in place of which it is made.
          cut: number of events before the power cut.
          model: one of `MODELS`.
          rng: decides what is lost.
        """
        state = _State(self.root, self._before, self._inodes)
        for time, event in enumerate(self.events[:cut]):
            state.apply(time, event)
        shutil.rmtree(target, ignore_errors=True)
        state.build(target, model, rng, cut)

    def moments(self, count: int, rng: random.Random) -> list[int]:
        """Chooses cuts: half of them any, half just before or after a rename, where most goes wrong."""
        renames = [time for time, event in enumerate(self.events) if event.kind == _Kind.RENAME]
        around = [time + rng.randint(0, 3) for time in rng.choices(renames, k=count // 2)] if renames else []
        any_time = [rng.randint(0, len(self.events)) for _ in range(count - len(around))]
        return sorted(min(time, len(self.events)) for time in [*around, *any_time])


def _parse(record: bytes) -> Iterator[Event]:
    position = 0
    while position < len(record):
        kind, is_folder, mode, *sizes, inode, offset, data_bytes, _ = _HEADER.unpack_from(record, position)
        position += _HEADER.size
        parts = []
        for size in (*sizes, data_bytes):
            parts.append(record[position : position + size])
            position += size
        paths = (os.path.normpath(os.fsdecode(part)) if part else "" for part in parts[:2])
        yield Event(kind, mode, *paths, inode, bool(is_folder), offset, parts[2])


class _State:
    """Files and names, with what of them is on the disk."""

    def __init__(self, root: pathlib.Path, before: Tree, inodes: Mapping[str, int]):
        self._root_path = os.fspath(root)
        self._root = _Folder()
        self._inodes: dict[int, _Node] = {}
        self._renames: list[_Rename] = []
        self._commit = 0  # ext4: names changed before this time are on the disk.
        for path, content in before.items():
            node: _Node
            if content is None:
                node = _Folder() if path else self._root
            else:
                node = _Link(content) if isinstance(content, str) else _File(content)
            self._inodes[inodes[path]] = node
            if path:
                parent, name = self._place(os.path.join(self._root_path, path))
                parent.before[name] = parent.now[name] = node

    def _place(self, path: str) -> tuple[_Folder, str]:
        """Finds a path's folder as programs see it; outside of the root it is a folder that nobody sees."""
        relative = os.path.relpath(path, self._root_path)
        if relative.startswith(".."):
            return _OUTSIDE, path
        *folders, name = relative.split(os.sep)
        folder = self._root
        for part in folders:
            found = folder.now[part]
            assert isinstance(found, _Folder), f"{path} goes through a link, which isn't modelled"
            folder = found
        return folder, name

    def _set(self, time: int, *names: tuple[tuple[_Folder, str], _Node | None]) -> None:
        self._renames.append(_Rename(time, dict(names)))
        for (folder, name), node in names:
            if node is None:
                folder.now.pop(name, None)
            else:
                folder.now[name] = node

    def apply(self, time: int, event: Event) -> None:
        """Applies an event."""
        node = self._inodes.get(event.inode)
        match event.kind:
            case _Kind.CREATE | _Kind.MKDIR:
                new = _File(mode=event.mode) if event.kind == _Kind.CREATE else _Folder(mode=event.mode)
                place = self._place(event.first)
                if place[0] is not _OUTSIDE:
                    self._inodes[event.inode] = new
                self._set(time, (place, new))
            case _Kind.SYMLINK:
                self._set(time, (self._place(event.second), _Link(event.first)))
            case _Kind.RENAME | _Kind.LINK:
                self._move(time, event)
            case _Kind.UNLINK | _Kind.RMDIR:
                self._set(time, (self._place(event.first), None))
            case _Kind.CHMOD if isinstance(node, _File | _Folder):
                node.mode = event.mode
            case _Kind.TRUNCATE if isinstance(node, _File):
                node.changes.append((time, event.offset))
            case _Kind.WRITE:
                assert isinstance(node, _File), "a file was written that the record doesn't know"
                node.changes.append((time, event.offset, event.data))
            case _Kind.SYNC if node:
                self._sync(time, node)
            case _Kind.SYNC_ALL:
                for one in self._inodes.values():
                    self._sync(time, one)

    def _move(self, time: int, event: Event) -> None:
        assert not event.mode & 2, "an exchange of names isn't modelled"
        source, target = self._place(event.first), self._place(event.second)
        if source == target or source[0] is target[0] is _OUTSIDE:
            return
        assert source[0] is not _OUTSIDE, f"{event.first} is moved into the folder, which isn't modelled"
        gone = [(source, None)] if event.kind == _Kind.RENAME else []
        self._set(time, *gone, (target, source[0].now[source[1]]))

    def _sync(self, time: int, node: _Node) -> None:
        self._commit = time
        if isinstance(node, _File):
            node.synced = len(node.changes)
        for rename in self._renames:
            rename.synced |= any(folder is node for folder, _ in rename.names)

    def build(self, target: pathlib.Path, model: str, rng: random.Random, cut: int) -> None:
        """Writes a folder as `Record.build` says."""
        journal = rng.randint(self._commit, cut)
        share = rng.choice([0.2, 0.5, 0.8, 1])
        kept = {
            WHOLE: lambda rename: True,
            SYNCED: lambda rename: rename.synced,
            EXT4: lambda rename: rename.synced or rename.time < journal,
            POSIX: lambda rename: rename.synced or rng.random() < share,
        }[model]
        names: dict[_Folder, dict[str, _Node]] = {}
        for rename in filter(kept, self._renames):
            for (folder, name), node in rename.names.items():
                entries = names.setdefault(folder, dict(folder.before))
                entries.pop(name, None)
                if node is not None:
                    entries[name] = node
        written: dict[_File, pathlib.Path] = {}

        def write(folder: _Folder, path: pathlib.Path) -> None:
            path.mkdir()
            for name, node in sorted(names.get(folder, folder.before).items()):
                place = path / name
                if isinstance(node, _Folder):
                    write(node, place)
                elif isinstance(node, _Link):
                    place.symlink_to(node.target)
                elif node in written:
                    place.hardlink_to(written[node])
                else:
                    place.write_bytes(_content(node, model, rng, journal))
                    place.chmod(node.mode)
                    written[node] = place
            path.chmod(folder.mode)

        write(self._root, target)


def _content(file: _File, model: str, rng: random.Random, journal: int) -> bytes:
    """Returns a file's content after a power cut."""
    content = bytearray(file.content)
    on_disk = len(file.changes) if model == WHOLE else file.synced
    for change in file.changes[:on_disk]:
        _change(content, change)
    share = rng.choice([0, 0.5, 0.9, 1])
    if model == EXT4:
        _change_as_ext4(content, file.changes[on_disk:], rng, share, journal)
    elif model == POSIX:
        _change_as_posix(content, file.changes[on_disk:], rng, share)
    return bytes(content)


def _change_as_ext4(
    content: bytearray, changes: Sequence[tuple], rng: random.Random, share: float, journal: int
) -> None:
    grows = True  # Nothing follows a page that is lost at the end.
    for change in changes:
        if len(change) == 2:
            if change[0] < journal:
                _change(content, change)
                grows = True
            continue
        for start, part in _pages(*change[1:]):
            kept = rng.random() < share
            if start + len(part) > len(content):
                grows = kept = grows and kept
            if kept:
                _change(content, (change[0], start, part))


def _change_as_posix(content: bytearray, changes: Sequence[tuple], rng: random.Random, share: float) -> None:
    for change in changes:
        if len(change) == 2:
            if rng.random() < share:
                _change(content, change)
            continue
        for start, part in _pages(*change[1:]):
            if rng.random() < share:
                _change(content, (change[0], start, part))
            elif rng.random() < 0.5:  # The size without the data.
                content.extend(bytes(max(0, start + len(part) - len(content))))


def _change(content: bytearray, change: tuple) -> None:
    if len(change) == 2:
        size = change[1]
        del content[size:]
        content.extend(bytes(size - len(content)))
    else:
        _, offset, data = change
        content.extend(bytes(max(0, offset - len(content))))
        content[offset : offset + len(data)] = data


def _pages(offset: int, data: bytes) -> Iterator[tuple[int, bytes]]:
    """Splits data at the file's pages."""
    end = offset + len(data)
    while offset < end:
        size = min(PAGE - offset % PAGE, end - offset)
        begin = len(data) - (end - offset)
        yield offset, data[begin : begin + size]
        offset += size


def tree(root: pathlib.Path) -> Tree:
    """Reads a folder; "" is itself."""
    found: dict[str, bytes | str | None] = {}
    for path in [root, *sorted(root.rglob("*"))]:
        name = "" if path == root else str(path.relative_to(root))
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = None if path.is_dir() else path.read_bytes()
    return found


def differences(wanted: Tree, found: Tree) -> list[str]:
    """Lists how a folder differs from another: "+name", "-name" or "~name"."""
    return sorted(
        [f"-{name}" for name in wanted.keys() - found.keys()]
        + [f"+{name}" for name in found.keys() - wanted.keys()]
        + [f"~{name}" for name in wanted.keys() & found.keys() if wanted[name] != found[name]]
    )
