"""Power cuts: what was being written is complete or absent, and a command that is given again mends the rest.

`power_cut.py` is the long form, with more commands and more moments.
"""

import os
import pathlib
import random
import sys

import pytest

HERE = pathlib.Path(__file__).resolve().parent
sys.path.append(str(HERE))

import commands  # noqa: E402
import disk  # noqa: E402
import power_cut  # noqa: E402

ENVIRONMENT = os.environ | {"PYTHONPATH": f"{HERE.parents[1]}:{HERE}"}


@pytest.fixture(scope="module")
def recorder(tmp_path_factory) -> pathlib.Path:
    try:
        return disk.build_recorder(tmp_path_factory.mktemp("recorder"))
    except disk.NoRecorderError as error:
        pytest.skip(str(error))


@pytest.fixture
def record(tmp_path, recorder) -> disk.Record:
    (tmp_path / "root").mkdir()
    return disk.Record(tmp_path / "root", recorder)


def outcomes(record: disk.Record, target: pathlib.Path, model: str, cut: int | None = None) -> list[dict]:
    """Lists how a folder may look after a power cut, by default at the end."""
    found = []
    for seed in range(100):
        record.build(target, len(record.events) if cut is None else cut, model, random.Random(seed))
        found.append(disk.tree(target))
    return found


def test_all_ways_to_write_are_recorded(tmp_path, record):
    (tmp_path / "given").write_bytes(b"given" * 5000)
    (record.root / "before").write_bytes(b"before")
    record = disk.Record(record.root, record.recorder)
    code = """
import os, shutil, subprocess
os.mkdir("folder")
shutil.copyfile("../given", "folder/copy")  # sendfile, or copy_file_range
file = os.open("folder/copy", os.O_RDWR)
os.pwrite(file, b"pwrite", 3); os.writev(file, [b"wri", b"tev"]); os.pwritev(file, [b"pwritev"], 9000)
os.ftruncate(file, 20000); os.close(file)
os.truncate("before", 3)
with open("before", "ab") as file: file.write(b" and appended")
os.rename("folder", "renamed"); os.link("before", "hard link"); os.symlink("before", "link")
shell = "echo a shell > shell; cp shell gone; rm gone; mv shell renamed/shell; chmod 600 renamed/shell"
subprocess.run(shell, shell=True)
os.rmdir(os.path.abspath("../root/./renamed/..") + "/" + (os.mkdir("short") or "short"))
"""
    # `run` compares what the events explain with what is there.
    record.run(["sh", "-c", f'cd {record.root} && exec {sys.executable} -c "$1"', "", code])
    assert len(record.events) > 20
    assert (record.root / "renamed/shell").read_text() == "a shell\n"


def test_writes_that_the_recorder_cannot_see_are_noticed(record):
    code = (
        "import mmap, sys; file = open(sys.argv[1], 'w+b'); file.write(bytes(9)); file.flush()\n"
        "mmap.mmap(file.fileno(), 9)[:] = b'x' * 9"
    )
    with pytest.raises(AssertionError, match="missed writes: .'~mapped'"):
        record.run([sys.executable, "-c", code, str(record.root / "mapped")])


def test_what_is_not_synchronised_may_be_lost(tmp_path, record):
    code = "import os; open('new', 'wb').write(b'x' * 9000); os.rename('new', 'final')"
    record.run(["sh", "-c", f'cd {record.root} && {sys.executable} -c "{code}"'])
    whole = {"": None, "final": b"x" * 9000}
    assert outcomes(record, tmp_path / "cut", disk.WHOLE) == [whole] * 100
    assert outcomes(record, tmp_path / "cut", disk.SYNCED) == [{"": None}] * 100
    ext4 = outcomes(record, tmp_path / "cut", disk.EXT4)
    posix = outcomes(record, tmp_path / "cut", disk.POSIX)
    for found in (ext4, posix):
        assert whole in found
        assert {"": None, "final": b""} in found
        assert {"": None} in found
    # The new name without the file's first page, or with zeros for it.
    torn = [tree["final"] for tree in posix if "final" in tree and 0 < tree["final"].count(b"\0") < 9000]
    assert torn
    assert not any(b"\0" in tree.get("final", b"") for tree in ext4)
    assert {len(tree["final"]) for tree in ext4 if "final" in tree} == {0, 4096, 8192, 9000}


def test_what_is_synchronised_stays(tmp_path, record):
    code = (
        "import os; f = open('a', 'wb'); f.write(b'x' * 9000); f.flush(); os.fsync(f.fileno())\n"
        "os.rename('a', 'b'); os.fsync(os.open('.', 0)); f.write(b'y' * 9000); f.close(); os.mkdir('c')"
    )
    record.run(["sh", "-c", f'cd {record.root} && {sys.executable} -c "{code}"'])
    for model in disk.MODELS:
        for tree in outcomes(record, tmp_path / "cut", model):
            assert tree["b"].startswith(b"x" * 9000)
            assert "a" not in tree


def test_writing_is_complete_or_absent_and_stays(tmp_path, record):
    record.run([sys.executable, str(HERE / "writes.py"), str(record.root)], ENVIRONMENT)
    final = disk.tree(record.root)
    made = {
        "file": ["file"],
        "parts": ["parts"],
        "folder": ["some/deep/folder/file"],
        "directory": [name for name in final if name.startswith("another/deep/directory/")],
        "moved": [name for name in final if name.startswith("moved/")],
    }
    assert len(made["directory"]) == 5
    returns = {os.path.basename(event.first): time for time, event in enumerate(record.events)}
    for cut in range(len(record.events) + 1):
        for seed, model in enumerate(disk.MODELS):
            record.build(tmp_path / "cut", cut, model, random.Random(cut * 10 + seed))
            tree = disk.tree(tmp_path / "cut")
            for step, names in made.items():
                there = [name for name in names if name in tree]
                # A directory that is there at all is complete.
                assert there in ([], names), (cut, model)
                if step == "file":
                    assert tree.get("file") in (None, final["file"], final["file"][::-1])
                    if cut > returns["file again"]:
                        assert tree["file"] == final["file"]
                else:
                    assert all(tree[name] == final[name] for name in there), (cut, model)
                if cut > returns[step]:
                    assert there, (cut, model, step)


def test_predictions_continue_after_a_power_cut(tmp_path, model_dir, recorder):
    images, root = tmp_path / "images", tmp_path / "root"
    root.mkdir()
    flags = ("--heatmaps=npz", "--overlay", "--report", "--threads=2")
    command = commands.predict("predict", model_dir, images, 16, root / "new/out", *flags)
    record = disk.Record(root, recorder)
    record.run([sys.executable, "-c", command.code()], ENVIRONMENT, command.codes)
    wanted = disk.tree(root)
    with commands.loaded_once():
        found = list(
            power_cut.outcomes(
                record, command.run_here, lambda: disk.tree(root), wanted, command.codes, 20, 1
            )
        )
    assert [str(outcome) for outcome in found if outcome.verdict != power_cut.SAME] == []
    assert len(found) == 20
