"""Compiled programs are found again, and a cache that can't be used stops nothing."""

import os
import pathlib
import subprocess
import sys
import warnings

import jax
import pytest
from PIL import Image

from richhf_jax import compilation_cache

ROOT = pathlib.Path(compilation_cache.__file__).resolve().parents[1]
SETTINGS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Makes an empty cache folder, and resets jax's settings to those at its start."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_folder_is_the_users_own(home, monkeypatch):
    compilation_cache.configure(True)
    folder = home / "cache/richhf_jax/compiled"
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert (folder.stat().st_mode & 0o777, list(folder.iterdir())) == (0o700, [])
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.1


@pytest.mark.parametrize("given", ["", "relative"])
def test_without_a_cache_folder_it_is_in_the_home(home, monkeypatch, given):
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("HOME", str(home))
    compilation_cache.configure(True)
    assert jax.config.jax_compilation_cache_dir == f"{home}/.cache/richhf_jax/compiled"


def test_what_the_user_gave_to_jax_stays(home, monkeypatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    compilation_cache.configure(True)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == before
    jax.config.update("jax_compilation_cache_dir", str(home / "mine"))
    compilation_cache.configure(True)
    assert jax.config.jax_compilation_cache_dir == str(home / "mine")


def test_several_processes_need_a_folder_that_they_share(home, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    compilation_cache.configure(True)
    assert jax.config.jax_compilation_cache_dir is None
    assert list(home.iterdir()) == []


def test_a_folder_that_can_not_be_written_is_told_once(home, capsys):
    (home / "cache").touch()
    compilation_cache.configure(True)
    assert jax.config.jax_compilation_cache_dir is None
    [message] = capsys.readouterr().err.splitlines()
    assert message.startswith("warning: compiled programs aren't kept, so each run compiles anew: [Errno 20]")
    assert f"{home}/cache" in message


def test_a_user_without_a_home_has_no_cache(home, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # So Python tells it.
    compilation_cache.configure(True)
    assert jax.config.jax_compilation_cache_dir is None
    assert capsys.readouterr().err.count("\n") == 1


def test_the_oldest_go_when_there_are_too_many(home, monkeypatch):
    folder = home / "cache/richhf_jax/compiled"
    folder.mkdir(parents=True)
    for number in (3, 1, 4, 2):
        (folder / f"jit_{number}-cache").write_bytes(bytes(10))
        os.utime(folder / f"jit_{number}-cache", (number, 0))
    (folder / "another").write_bytes(bytes(10))
    # The choices of XLA's autotuning on a GPU are small, and cost more time than programs.
    choices = folder / "xla_gpu_per_fusion_autotune_cache_dir"
    choices.mkdir()
    (choices / "one-cache").write_bytes(bytes(100))
    os.utime(choices / "one-cache", (0, 0))
    monkeypatch.setattr(compilation_cache, "_MAX_BYTES", 25)
    compilation_cache.configure(True)
    assert sorted(path.name for path in folder.iterdir()) == [
        *("another", "jit_3-cache", "jit_4-cache"),
        choices.name,
    ]
    assert [path.name for path in choices.iterdir()] == ["one-cache"]


def test_other_warnings_are_shown(home, monkeypatch):
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: shown.append(str(message)))
    compilation_cache.configure(True)
    folder = home / "cache/richhf_jax/compiled"
    for name in ("jit_a-0-cache", "jit_ab-0-cache"):
        (folder / name).touch()
    (folder / "jit_a-1-cache").mkdir()  # Nobody knows whose; it stays.
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for what in ("Error writing persistent compilation cache entry for 'jit_a': OSError", "Another"):
            warnings.warn(what, stacklevel=1)
    assert shown == ["Another"]
    assert {path.name for path in folder.iterdir()} == {"jit_ab-0-cache", "jit_a-1-cache"}


# The command, as users run it. It prints what JAX tells of its cache.
COUNTED = """
import collections, sys, jax
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rpartition("/")[2]]))
from richhf_jax.predict.__main__ import main
try:
    main(sys.argv[1:])
finally:
    print(events["cache_hits"], events["cache_misses"])
"""


@pytest.fixture
def score(model_dir, tmp_path):
    """Scores an image into a folder; returns (programs found, programs compiled and kept), stderr."""
    Image.new("RGB", (16, 12), (200, 10, 10)).save(tmp_path / "a.png")
    environment = os.environ | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    del environment["JAX_COMPILATION_CACHE_DIR"]

    def run(out, *flags):
        command = [sys.executable, "-c", COUNTED, f"--checkpoint={model_dir}", f"--out={tmp_path / out}"]
        result = subprocess.run(
            [*command, str(tmp_path / "a.png"), "--prompt=a red cat", *flags],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return tuple(map(int, result.stdout.splitlines()[-1].split())), result.stderr

    return run


def test_the_second_run_compiles_nothing(score, tmp_path):
    folder = tmp_path / "cache/richhf_jax/compiled"

    def predictions(out):
        paths = sorted(path for path in (tmp_path / out).rglob("*") if path.is_file())
        return {str(path.relative_to(tmp_path / out)): path.read_bytes() for path in paths}

    assert score("off", "--no-compilation-cache")[0] == (0, 0)
    assert not folder.exists()
    (found, kept), _ = score("cold")
    names = {path.name for path in folder.iterdir()}
    assert (found, kept) == (0, len(names))
    assert any(name.startswith("jit_predict-") for name in names)
    assert score("warm")[0] == (kept, 0)
    for path in folder.iterdir():  # As a full disk leaves them.
        os.truncate(path, path.stat().st_size // 2)
    counts, stderr = score("damaged")
    assert counts == (0, kept)
    assert "Warning" not in stderr
    assert score("mended")[0] == (kept, 0)
    assert {path.name for path in folder.iterdir()} == names
    expected = predictions("off")
    for out in ("cold", "warm", "damaged", "mended"):
        assert predictions(out) == expected, out
