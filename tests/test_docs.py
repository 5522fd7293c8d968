"""README.md and docs/*.md: what they name exists, their commands parse, their links lead somewhere."""

import argparse
import contextlib
import copy
import functools
import importlib
import io
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from types import ModuleType
from unittest import mock

import gin
import pytest
from absl import flags

import richhf_jax
from richhf_jax import errors, gin_utils

ROOT = pathlib.Path(richhf_jax.__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
ARCHITECTURE = ROOT / "docs/architecture.md"
MAX_README_LINES = 120
# A page's two most wanted commands stand in its first lines.
OPENING_LINES = 12
# What programs set themselves: gin files where none is given, and a value that a plan doesn't need.
OWN_GIN_FILES = {"richhf_jax.convert.__main__": ["models/rahf_base.gin"]}
OWN_BINDINGS = {"richhf_jax.precompile": ["MODEL_DIR = 'none'"]}
# Knows every macro and function that a setting in prose may name.
ANY_RUN = (
    "python -m richhf_jax.infer --gin_file=experiments/quickstart.gin --gin_file=partitioning/v5e_16.gin"
    " --gin_file=runs/infer.gin --gin.MODEL_DIR=runs/mine"
)


def macros(root: pathlib.Path) -> set[str]:
    """Returns the macros that gin files set."""
    texts = [path.read_text() for path in (root / "gin").rglob("*.gin")]
    return {name for text in texts for name in re.findall(r"^([A-Z]\w*) = ", text, re.MULTILINE)}


def link_targets(text: str) -> set[str]:
    """Returns the targets of links and pictures within the repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text)
    return {first or second for first, second in targets if not re.match(r"[a-z]+:", first or second)}


def broken_references(text: str, root: pathlib.Path, folder: pathlib.Path | None = None) -> list[str]:
    """Returns what a text names that isn't in the repository `root`.

    Args:
      text: a page in Markdown.
      root: of the repository.
      folder: where the page is, for its links; default `root`.
    """
    broken = set()
    for module in re.findall(r"python3? -m (richhf_jax[\w.]*)", text):
        path = root / module.replace(".", "/")
        if not path.with_suffix(".py").exists() and not (path / "__main__.py").exists():
            broken.add(f"python -m {module}")
    for name in re.findall(r"[\w./-]+/[\w-]+\.gin", text):
        ours = not name.startswith("t5x/")
        if ours and not (root / name).exists() and not (root / "gin" / name).exists():
            broken.add(name)
    scripts = re.findall(r"(?:bash|python3?) (\S+\.(?:sh|py))", text)
    paths = re.findall(r"`((?:richhf_jax|tasks|gin|launch|tests|docs)/[\w./-]*)`", text)
    broken |= {name for name in [*scripts, *paths] if not (root / name).exists()}
    for target in link_targets(text):
        path = target.partition("#")[0]
        if path and not ((folder or root) / path).exists():
            broken.add(target)
    known = macros(root)
    broken |= {f"--gin.{name}" for name in set(re.findall(r"--gin\.(\w+)=", text)) - known - {"NAME"}}
    for table in re.findall(r"^\| macro \|.*\n\|.*\n((?:\|.*\n?)*)", text, re.MULTILINE):
        cells = re.findall(r"^\|(.*?)\|", table, re.MULTILINE)
        broken |= {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} - known
    return sorted(broken)


def anchors(text: str) -> set[str]:
    """Returns what GitHub calls the headings of a page: '## A task, `b`' -> 'a-task-b'."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_anchors(page: pathlib.Path) -> list[str]:
    """Returns the links of a page to a heading that isn't there."""
    broken = []
    for target in link_targets(page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        other = page.parent / path if path else page
        if anchor and other.exists() and anchor not in anchors(other.read_text()):
            broken.append(target)
    return sorted(broken)


def commands(text: str) -> list[str]:
    """Returns the commands of ours in a text: lines of code blocks, and code spans that have arguments."""
    text = re.sub(r"\s*\\\n\s*", " ", text)
    start = r"(?:python -m richhf_jax|bash launch/)"
    lines = re.findall(rf"^ *({start}.*)", text, re.MULTILINE)
    return [*lines, *re.findall(rf"`({start}[^`\n]* [^`\n]*)`", text)]


def settings(text: str) -> list[str]:
    """Returns the gin settings that stand alone in a code span; those =VALUE are placeholders."""
    return [span for span in re.findall(r"`(--gin\.[^`\n]+)`", text) if "=VALUE" not in span]


def opening_commands(text: str) -> list[str]:
    """Returns the commands in a page's first lines."""
    return commands("\n".join(text.splitlines()[:OPENING_LINES]))


def front_page_problems(text: str, pages: Sequence[str]) -> list[str]:
    """Returns why a README is no front page: it is long, or doesn't link to one of the pages in docs/."""
    lines = len(text.splitlines())
    problems = [f"{lines} lines, at most {MAX_README_LINES}"] if lines > MAX_README_LINES else []
    return problems + [
        f"no link to docs/{page}" for page in pages if f"docs/{page}" not in link_targets(text)
    ]


def wrongly_named_parts(text: str, root: pathlib.Path) -> list[str]:
    """Returns modules and folders of the package that a text doesn't name, and those that it names wrongly.

    Modules within folders needn't be named; the folders must stand first in a table's row.
    """
    package = root / "richhf_jax"
    spine = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    modules = {path.name for top in (package, root / "tests") for path in top.rglob("*.py")}
    named = set(re.findall(r"`(?:\w+/)*(\w+\.py)`", text))
    wings = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    named_wings = set(re.findall(r"^\| `richhf_jax/(\w+/)` \|", text, re.MULTILINE))
    return sorted((spine - named) | (named - modules) | (wings ^ named_wings))


class Parsed(BaseException):
    """The arguments were parsed, and nothing else shall run."""


def refusal(command: str) -> str | None:
    """Returns what the program says against a command's arguments, None where it takes them."""
    words = shlex.split(command, comments=True)
    if words[0] == "bash":
        return _launcher_refusal(words[1], words[2:])
    return _module_refusal(words[2], words[3:])


def _module_refusal(name: str, arguments: Sequence[str]) -> str | None:
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{name}.__main__")
    by_argparse = hasattr(module, "argparse")
    return (_argparse_refusal if by_argparse else _gin_refusal)(module, arguments)


def _argparse_refusal(module: ModuleType, arguments: Sequence[str]) -> str | None:
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(*args, **kwargs):
        parse_args(*args, **kwargs)
        raise Parsed

    stderr = io.StringIO()
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_and_stop),
        mock.patch.object(sys, "argv", [module.__name__, *arguments]),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            module.main()
        except Parsed:
            return None
        except SystemExit:
            return stderr.getvalue().splitlines()[-1]
    raise AssertionError(f"{module.__name__} parsed no arguments")


def _gin_refusal(module: ModuleType, arguments: Sequence[str]) -> str | None:
    values = flags.FlagValues()
    # FLAGS itself also has the flags of other programs that were imported.
    by_module = flags.FLAGS.flags_by_module_dict()
    for flag in [*by_module.get(module.__name__, []), *by_module[gin_utils.__name__]]:
        values[flag.name] = copy.deepcopy(flag)
    try:
        unexpected = values([module.__name__, *gin_utils.rewrite_gin_args(arguments)])[1:]
        if unexpected:
            return f"unexpected argument {unexpected[0]!r}"
        files = values.gin_file or OWN_GIN_FILES.get(module.__name__)
        if not files:
            return "no --gin_file"
        bindings = [*OWN_BINDINGS.get(module.__name__, []), *values.gin_bindings]
        gin.clear_config()
        gin_utils.parse_gin_flags(
            [*values.gin_search_paths, *gin_utils.DEFAULT_SEARCH_PATHS], files, bindings
        )
    except (flags.Error, errors.UserError) as error:
        return str(error)
    return None


@functools.cache
def _usage(script: str) -> str:
    """Returns what a launcher prints with --help. Scripts without it are never run."""
    if "usage()" not in (ROOT / script).read_text():
        return ""
    return subprocess.run(
        ["bash", script, "--help"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout


def _launcher_refusal(script: str, arguments: Sequence[str]) -> str | None:
    dashes = arguments.index("--") if "--" in arguments else len(arguments)
    own, program = arguments[:dashes], arguments[dashes + 1 :]
    training = [argument for argument in own if argument.startswith(("--gin", "--tfds_data_dir"))]
    for flag in (argument.partition("=")[0] for argument in own if argument not in training):
        if flag.startswith("--") and not re.search(rf"{flag}(?![\w-])", _usage(script)):
            return f"{script} --help doesn't name {flag}"
    if program:
        return _module_refusal(f"richhf_jax.{program[0]}", program[1:])
    if "TRAINING ARGUMENTS" in _usage(script):
        return _module_refusal("richhf_jax.train", training)
    return None


@pytest.fixture
def repository(tmp_path: pathlib.Path) -> pathlib.Path:
    for name in ("richhf_jax/train.py", "richhf_jax/datasets/__main__.py", "launch/test.sh", "docs/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "gin/runs").mkdir(parents=True)
    (tmp_path / "gin/runs/train.gin").write_text("TRAIN_STEPS = 1\n")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("python -m richhf_jax.train", []),
        ("python -m richhf_jax.datasets --data_dir=x", []),
        ("python -m richhf_jax.nope", ["python -m richhf_jax.nope"]),
        ("`gin/runs/train.gin` or runs/train.gin", []),
        ("`gin/runs/nope.gin`", ["gin/runs/nope.gin"]),
        ("include 't5x/configs/runs/pretrain.gin'", []),
        ("bash launch/test.sh", []),
        ("bash launch/nope.sh", ["launch/nope.sh"]),
        ("python richhf_jax/train.py and python tests/nope.py", ["tests/nope.py"]),
        ("![a](docs/a.png) [b](https://a.b/c) [c](#d)", []),
        ('![a](docs/b.png) <img src="docs/c.png">', ["docs/b.png", "docs/c.png"]),
        ("[a](docs/a.png#b) [c](docs/nope.md#b)", ["docs/nope.md#b"]),
        ("`richhf_jax/` `richhf_jax/train.py` `tests/nope.py` `tasks/`", ["tasks/", "tests/nope.py"]),
        ("--gin.TRAIN_STEPS=3 --gin.train.x=1 --gin.NAME=value", []),
        ("--gin.STEPS=3", ["--gin.STEPS"]),
        ("| macro | a |\n| --- | --- |\n| `TRAIN_STEPS`, `STEPS` | `x` |\n| `B` | |\n", ["B", "STEPS"]),
        ("| flag | a |\n| --- | --- |\n| `STEPS` | x |\n", []),
    ],
)
def test_broken_references(repository, text, broken):
    assert broken_references(text, repository) == broken


def test_links_begin_in_the_folder_of_the_page(repository):
    text = "[a](a.png) [b](docs/a.png) [c](../gin)"
    assert broken_references(text, repository, repository / "docs") == ["docs/a.png"]


def test_broken_anchors(tmp_path):
    (tmp_path / "a.md").write_text(
        "# A task, `b_c`\n```\n# no heading\n```\n[x](#a-task-b_c) [y](#no-heading)\n"
    )
    (tmp_path / "b.md").write_text("[x](a.md#a-task-b_c) [y](a.md#b) [z](a.md) [u](https://a.b#c)\n")
    assert broken_anchors(tmp_path / "a.md") == ["#no-heading"]
    assert broken_anchors(tmp_path / "b.md") == ["a.md#b"]


def test_commands_of_a_text():
    text = """
    `bash launch/test.sh` and `python -m richhf_jax.train` are names, `python -m richhf_jax.eval --x=1` isn't.

        python -m richhf_jax.train --a=1 \\
            --b=2  # comment
        python -m t5x.train --c=3
    """
    assert commands(text) == [
        "python -m richhf_jax.train --a=1 --b=2  # comment",
        "python -m richhf_jax.eval --x=1",
    ]


TRAIN = "python -m richhf_jax.train --gin_file=experiments/quickstart.gin --gin.MODEL_DIR=a"
TPU = "bash launch/tpu_vm.sh --name=a --gin_file=experiments/quickstart.gin --gin.MODEL_DIR=gs://a/b"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("python -m richhf_jax.predict --checkpoint=a --out=b c.png --shard=0/4 # d", None),
        ("python -m richhf_jax.predict --out=b c.png", "required: --checkpoint"),
        ("python -m richhf_jax.predict --checkpoint=a --out=b c.png --shard=4/4", "no INDEX/COUNT"),
        (
            "python -m richhf_jax.predict --checkpoint=a --out=b c.png --nope",
            "unrecognized",
        ),
        ("python -m richhf_jax.benchmarks.steps --gin.REMAT_POLICY=full", None),
        (f"{TRAIN} --profile_steps=1:2 --gin.train.eval_steps=3", None),
        (f"{TRAIN} --topology=v5e:4x4", "Unknown command line flag 'topology'"),
        (f"{TRAIN} --gin.TRAIN_STEP=3", "did you mean TRAIN_STEPS?"),
        (f"{TRAIN} --gin.train.eval_step=3", "eval_step"),
        (f"{TRAIN} --gin_file=runs/nope.gin", "runs/nope.gin"),
        (f"{TRAIN} more", "unexpected argument 'more'"),
        ("python -m richhf_jax.train --gin_file=experiments/quickstart.gin", "no value for MODEL_DIR"),
        ("python -m richhf_jax.train --gin.MODEL_DIR=a", "no --gin_file"),
        ("python -m richhf_jax.convert --from=a --to=b", None),
        ("python -m richhf_jax.convert --from=a --to=b --format=nope", "nope"),
        ("bash launch/test.sh tests", None),
        ("bash launch/quickstart.sh --gin.TRAIN_STEPS=100", None),
        ("bash launch/quickstart.sh --ou=a", "doesn't name --ou"),
        (f"{TPU} --spot --dry-run", None),
        (f"{TPU} --spott", "doesn't name --spott"),
        (f"{TPU} --gin.TRAIN_STEP=3", "did you mean TRAIN_STEPS?"),
        ("bash launch/local.sh --processes=2 -- eval --gin_file=nope.gin", "nope.gin"),
        ("bash launch/restartable.sh --anything", "doesn't name --anything"),
    ],
)
def test_refusals(command, message):
    found = refusal(command)
    assert found is None if message is None else message in found


def test_settings_of_a_text():
    text = "`--gin.A=1` `--gin.NAME=VALUE` --gin.B=2 `--c` `--gin.d.e=\"'f'\" --gin.G=1`"
    assert settings(text) == ["--gin.A=1", "--gin.d.e=\"'f'\" --gin.G=1"]


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.name)
def test_page(page):
    text = page.read_text()
    assert broken_references(text, ROOT, page.parent) == []
    assert broken_anchors(page) == []
    given = [*commands(text), *(f"{ANY_RUN} {setting}" for setting in settings(text))]
    found = {command: refusal(command) for command in given}
    assert {command: message for command, message in found.items() if message} == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_opens_with_its_two_most_wanted_commands(page):
    assert len(opening_commands(page.read_text())) >= 2


def test_opening_commands():
    first, second = "bash launch/test.sh", "python -m richhf_jax.train"
    assert opening_commands("\n".join(["# A", first, *[""] * 9, second])) == [first, second]
    assert opening_commands("\n".join(["# A", first, *[""] * 10, second])) == [first]


def test_the_readme_is_a_front_page_that_links_to_every_page():
    assert front_page_problems(README.read_text(), [page.name for page in PAGES]) == []


def test_front_page_problems():
    assert front_page_problems("[a](docs/a.md)\n" * MAX_README_LINES, ["a.md"]) == []
    assert front_page_problems("docs/b.md\n" * (MAX_README_LINES + 1), ["a.md", "b.md"]) == [
        "121 lines, at most 120",
        "no link to docs/a.md",
        "no link to docs/b.md",
    ]


def test_the_architecture_names_the_house():
    assert wrongly_named_parts(ARCHITECTURE.read_text(), ROOT) == []


def test_wrongly_named_parts(repository):
    for name in ("richhf_jax/__init__.py", "richhf_jax/datasets/__init__.py", "tests/test_a.py"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).touch()
    right = "`train.py` `tests/test_a.py`\n| `richhf_jax/datasets/` | data |\n"
    assert wrongly_named_parts(right, repository) == []
    assert wrongly_named_parts("`nope.py`\n| `richhf_jax/data/` | |", repository) == [
        "data/",
        "datasets/",
        "nope.py",
        "train.py",
    ]
