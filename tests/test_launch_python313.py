"""launch/python313.sh with stand-ins for the tools that make and enter Debian; the check for a compiler."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import richhf_jax

LAUNCH = pathlib.Path(richhf_jax.__file__).resolve().parents[1] / "launch"

# Notes how it was called. debootstrap makes the folders that the script writes to; unshare runs it alone.
FAKE_TOOL = r"""#!/usr/bin/env bash
tool=${0##*/}
[[ $tool == id ]] && exec echo "$FAKE_UID"
echo "$tool $*" >>"$FAKES/calls"
case $* in
  "--mount debootstrap"*) exec "${@:2}" ;;
  *trixie*)
    echo "E: no network"
    [[ $FAIL != debootstrap ]] || exit 1
    mkdir -p "${!#}/etc/ssl/certs" "${!#}/opt" ;;
  *"$FAIL"*) exit 1 ;;
esac
"""


class Machine:
    """A repository with the launchers, a machine with stand-ins, and the calls that they got."""

    def __init__(self, folder: pathlib.Path):
        self.dir, self.root, self.bin = folder / "debian", folder / "repository", folder / "bin"
        self.bin.mkdir()
        for name in ("id", "debootstrap", "unshare"):
            (self.bin / name).write_text(FAKE_TOOL)
            (self.bin / name).chmod(0o755)
        shutil.copytree(LAUNCH, self.root / "launch")
        subprocess.run(["git", "init", "-q"], cwd=self.root, check=True)
        self.commit()

    def commit(self) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        for command in (["add", "-A"], [*identity, "commit", "-qm", "all"]):
            subprocess.run(["git", *command], cwd=self.root, check=True)

    def run(self, *args: str, fail: str = "nothing", uid: int = 0) -> tuple[int, str, list[str]]:
        """Returns exit code, output and the calls, without what unshare's shell would run."""
        calls = self.bin / "calls"
        calls.write_text("")
        variables = {"FAKES": str(self.bin), "FAIL": fail, "FAKE_UID": str(uid)}
        result = subprocess.run(
            ["bash", str(self.root / "launch/python313.sh"), f"--dir={self.dir}", *args],
            env=os.environ | variables | {"PATH": f"{self.bin}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        lines = [line.strip() for line in calls.read_text().splitlines()]
        return result.returncode, result.stdout, [x for x in lines if x.startswith((f"{self.dir}/", "deb"))]


@pytest.fixture
def machine(tmp_path: pathlib.Path) -> Machine:
    return Machine(tmp_path)


def test_debian_is_made_once_and_each_run_tests_the_newest_commit(machine):
    system = machine.dir / "debian13"
    code, output, calls = machine.run("tests/network", "-k", "a or b")
    assert code == 0, output
    test = f"{system} bash /opt/richhf_jax/launch/test.sh"
    assert calls == [
        f"debootstrap --variant=minbase trixie {system}.part",
        f"{system} apt-get update -qq",
        f"{system} apt-get install -y -qq --no-install-recommends"
        " ca-certificates g++ git python3-dev python3-venv",
        f"{test} tests/network -k a or b",
    ]
    code_in_it = system / "opt/richhf_jax"
    (code_in_it / "stale").touch()
    (machine.root / "new").touch()
    machine.commit()
    code, output, calls = machine.run()
    assert (code, calls) == (0, [test]), output
    assert (code_in_it / "new").exists()
    assert not (code_in_it / "stale").exists()


@pytest.mark.parametrize("failed", ["debootstrap", "apt-get install", "test.sh"])
def test_a_part_that_failed_is_done_again(machine, failed):
    code, output, calls = machine.run(fail=failed)
    assert code == 1
    assert failed in calls[-1]
    if failed == "debootstrap":
        assert f"debootstrap failed; {machine.dir}/debootstrap.log ends with: E: no network" in output
    assert failed in "\n".join(machine.run()[2])


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no root", "only root can make a folder with Debian: sudo bash launch/python313.sh"),
        ("no debootstrap", "debootstrap is missing: apt-get install debootstrap"),
        ("files", "holds files that are not of this script: name an empty or new folder with --dir"),
        ("not committed", "not committed, so it would not run there: ?? new ...; commit it"),
        (
            "another's system",
            "holds files that are not of this script: name an empty or new folder with --dir",
        ),
        ("no value", "python313.sh: --commit needs a value; see --help"),
        ("empty value", "python313.sh: --dir needs a value; see --help"),
    ],
)
def test_mistakes(machine, monkeypatch, case, message):
    if case == "no debootstrap":
        (machine.bin / "debootstrap").unlink()
        kept = [p for p in os.environ["PATH"].split(":") if not (pathlib.Path(p) / "debootstrap").exists()]
        monkeypatch.setenv("PATH", ":".join(kept))
    if case == "files":
        machine.dir.mkdir()
        (machine.dir / "mine").touch()
    if case == "another's system":
        (machine.dir / "debian13").mkdir(parents=True)
    if case == "not committed":
        (machine.root / "new").touch()
    arguments = {"no value": ["--commit"], "empty value": ["--dir="]}
    code, output, calls = machine.run(*arguments.get(case, []), uid=1 if case == "no root" else 0)
    assert code == 1
    assert message in output
    assert calls == []


def test_help(machine):
    code, output, calls = machine.run("--help")
    assert (code, calls) == (0, [])
    assert output.startswith("Usage: bash launch/python313.sh ")


@pytest.mark.parametrize(
    ("version", "compiler", "header", "installed", "dies"),
    [
        ((3, 12), "none", False, False, False),
        ((3, 13), "none", True, False, True),
        ((3, 13), "bash", False, False, True),
        ((3, 13), "bash", True, False, False),
        ((3, 13), "none", False, True, False),
    ],
)
def test_a_missing_compiler_is_told_before_the_install(tmp_path, version, compiler, header, installed, dies):
    """A Python of another version is this one, told so by its sitecustomize."""
    (tmp_path / "Python.h" if header else tmp_path / "other").touch()
    (tmp_path / "sitecustomize.py").write_text(
        f"import importlib.util, sys, sysconfig\nsys.version_info = {version}\n"
        f"importlib.util.find_spec = lambda name: {installed}\n"
        f"sysconfig.get_path = lambda name: {str(tmp_path)!r}\n"
    )
    command = f"source {LAUNCH}/setup_venv.sh && check_compiler {sys.executable} && echo installing"
    result = subprocess.run(
        ["bash", "-c", command],
        env=os.environ | {"PYTHONPATH": str(tmp_path), "CXX": compiler},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (result.stdout, result.returncode) == (("", 1) if dies else ("installing\n", 0)), result.stderr
    assert ("apt-get install g++ python3.13-dev" in result.stderr) == dies
