"""The import rules of the architecture (who may import whom, TensorFlow, jax, gin), and where names stand."""

import ast
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

import richhf_jax
from richhf_jax import feedback

ROOT = pathlib.Path(richhf_jax.__file__).resolve().parents[1]

# A line a room: a module of the spine, a folder, or an entry point. It says which heavy libraries the room
# imports, and what of the project besides `errors` and `feedback`. A line may name only rooms above it, so
# imports point one way. What is allowed is what is used: a line that allows more fails, too.
RULES = """
allowed_values     |                |
gin_values         | tensorflow     | allowed_values
foreign_text       |                |
errors             |                | foreign_text
feedback           |                |
checksums          |                |
shapes             | jax            |
network            | jax            | shapes
muse               | jax            | network shapes
costs              | jax            |
device_memory      | jax            | costs
multihost          | jax            |
losses             | jax            | shapes
decoding           | jax            | shapes
keywords           |                |
pixels             |                |
prompt_encoders    |                | keywords
reading            |                |
clip_tokens        |                | reading
inputs             |                | foreign_text reading
weights_file       |                | checksums foreign_text reading
writing            |                | foreign_text
locking            |                | foreign_text writing
agreement          |                |
augmentation       | tensorflow     |
compilation_cache  | jax            |
flaws              | tensorflow     |
preprocessors      | tensorflow     | augmentation flaws
word_table         |                |
corruption         | tensorflow     | preprocessors word_table
datasets           | tensorflow torch | agreement corruption foreign_text inputs locking reading
                                        word_table writing
pages              |                | foreign_text writing
annotate           |                | agreement datasets foreign_text inputs pages reading writing
gin_utils          | tensorflow     | allowed_values compilation_cache foreign_text gin_values multihost
                                      writing
metrics            |                |
bootstrap          |                | metrics
image_values       |                | metrics reading writing
models             | jax            | decoding losses shapes
baselines          | jax            | losses models shapes
clip_model         | jax            | losses models network shapes
model_description  |                | allowed_values baselines checksums clip_model clip_tokens models
                                      network prompt_encoders reading writing
optimizers         | jax            |
survey             |                | agreement annotate foreign_text inputs pages reading writing
partitioning       | jax            | device_memory
postprocessors     |                | foreign_text
feature_converters | tensorflow     | preprocessors
input_pipeline     | tensorflow     | datasets feature_converters foreign_text preprocessors
tasks              | tensorflow     | clip_tokens corruption datasets input_pipeline metrics postprocessors
                                      preprocessors word_table writing
torch_twin         | torch          | network
train_state        | jax            |
sealing            | jax            | checksums reading writing
saved_arrays       | jax            | foreign_text reading sealing writing
checkpoints        | jax            | saved_arrays sealing train_state writing
convert            | jax            | checkpoints clip_tokens foreign_text model_description network reading
                                      sealing train_state weights_file writing
predict            | jax            | checkpoints checksums compilation_cache costs device_memory
                                      foreign_text inputs keywords locking model_description
                                      pages partitioning pixels sealing shapes train_state weights_file
                                      writing
export             | jax tensorflow | augmentation clip_tokens convert foreign_text model_description
                                      predict preprocessors reading weights_file writing
trainer            | jax            | losses models partitioning train_state
benchmarks         | jax tensorflow | costs datasets device_memory export keywords model_description
                                      models network partitioning predict torch_twin train_state
                                      trainer writing
split_predictions  | jax tensorflow | checkpoints input_pipeline keywords model_description models
                                      partitioning postprocessors trainer
training_log       | jax            | costs trainer writing
benchmarks.annotate |                |
benchmarks.attention | jax            |
benchmarks.clip    | tensorflow torch |
benchmarks.gpu_check.__main__ |                |
benchmarks.gpu_check.job |                |
benchmarks.input   | tensorflow     |
benchmarks.predict | jax tensorflow |
benchmarks.steps   | jax tensorflow |
calibrate          | jax            |
convert.__main__   | jax            |
eval               | jax tensorflow |
export.__main__    | jax            |
infer              | jax tensorflow |
precompile         | jax tensorflow |
tables             |                |
train              | jax tensorflow |
"""


def parse(rules: str) -> dict[str, tuple[set[str], set[str]]]:
    """Room -> what it imports of the project, and of `HEAVY`. An indented line continues the one above."""
    rows = (line.split("|") for line in re.sub(r"\n +", " ", rules.strip()).splitlines())
    return {name.strip(): (set(project.split()), set(heavy.split())) for name, heavy, project in rows}


HOUSE = parse(RULES)
# May import any room of the project: they stand on top.
ENTRY_POINTS = {
    *("calibrate", "train", "eval", "infer", "precompile", "tables"),
    *("export.__main__", "convert.__main__"),
    *(
        "benchmarks.annotate",
        "benchmarks.attention",
        "benchmarks.clip",
        "benchmarks.input",
        "benchmarks.predict",
        "benchmarks.steps",
    ),
    *("benchmarks.gpu_check.__main__", "benchmarks.gpu_check.job"),
}
HEAVY = {
    "jax": {"jax", "jaxlib", "flax", "optax", "orbax"},
    "tensorflow": {"tensorflow", "tensorflow_text", "tensorflow_datasets", "seqio", "gin"},
    "torch": {"torch", "transformers", "diffusers"},
}
# What needs numpy alone.
BARE = {"errors", "feedback", "foreign_text"}


def needs_tensorflow(name: str) -> bool:
    project, heavy = HOUSE[name]
    return "tensorflow" in heavy or any(map(needs_tensorflow, project))


# Works without the train extra. clu's writers, for `training_log`, import TensorFlow by themselves.
CORE = {name for name in HOUSE if name not in ENTRY_POINTS | {"training_log"} and not needs_tensorflow(name)}
CORE.add("export.__main__")
# What it imports of `annotate` needs no TensorFlow.
CORE.add("survey")

SOURCES = sorted(
    [path for folder in ("richhf_jax", "tasks", "torch_twin") for path in (ROOT / folder).rglob("*.py")]
)


def room(path: pathlib.Path) -> str:
    """The line of a file: its module, folder (`network`), entry point, `tasks` or `torch_twin`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if (entry_point := ".".join(parts[1:])) in ENTRY_POINTS:
        return entry_point
    return parts[1] if parts[0] == "richhf_jax" else parts[0]


def imported(tree: ast.AST) -> set[str]:
    """Dotted names that a module imports, anywhere in it: `from a import b` gives a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def used(name: str, imports: set[str]) -> tuple[set[str], set[str]]:
    """Lists what a room imports of the project besides `errors` and `feedback`, and its heavy libraries."""
    top_level = {module.split(".")[0] for module in imports}
    project = {module.split(".")[1] for module in imports if module.startswith("richhf_jax.")}
    # The package itself gives `RahfPredictor` and `RichFeedback`, and its version.
    project = {"predict" if module == "RahfPredictor" else module for module in project}
    project |= top_level & {"tasks", "torch_twin"}
    heavy = {library for library, names in HEAVY.items() if names & top_level}
    return project - {name.split(".")[0], "errors", "feedback", "RichFeedback", "__version__"}, heavy


def broken_rules(name: str, imports: set[str]) -> list[str]:
    """Names the imports of a file in the room `name` that the table forbids."""
    if name not in HOUSE:
        return [f"{name} has no line in the table of {pathlib.Path(__file__).name}"]
    allowed, allowed_heavy = HOUSE[name]
    project, heavy = used(name, imports)
    # Networks know nothing of commands, and so of no user's error.
    shared = set() if name != "network" else {"errors"} & {module.split(".")[-1] for module in imports}
    project -= allowed if name not in ENTRY_POINTS else set(HOUSE) - ENTRY_POINTS
    project |= shared
    broken = [f"{name} may not import {other}" for other in sorted(project | (heavy - allowed_heavy))]
    if name in BARE:
        top_level = {module.split(".")[0] for module in imports}
        third_party = top_level - sys.stdlib_module_names - {"numpy", "richhf_jax"}
        broken += [f"{name} may not import {module}" for module in sorted(third_party)]
    return broken


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_table(path):
    imports = imported(ast.parse(path.read_text()))
    if path == ROOT / "richhf_jax/__init__.py":
        assert imports == {"importlib", "sys", "typing.Any"}
    else:
        assert broken_rules(room(path), imports) == []


@pytest.mark.parametrize("name", HOUSE)
def test_what_is_allowed_is_what_is_used(name):
    project, heavy = set(), set()
    for path in SOURCES:
        if path != ROOT / "richhf_jax/__init__.py" and room(path) == name:
            more_project, more_heavy = used(name, imported(ast.parse(path.read_text())))
            project |= more_project
            heavy |= more_heavy
    if name in ENTRY_POINTS:
        project = set()
    assert HOUSE[name] == (project, heavy)


def test_the_table_points_one_way():
    above = set()
    for name, (allowed, _) in HOUSE.items():
        assert allowed <= above, name
        above.add(name)


@pytest.mark.parametrize(
    ("name", "statement", "rule"),
    [
        ("models", "from richhf_jax.network import t5", "models may not import network"),
        ("network", "from richhf_jax import errors", "network may not import errors"),
        ("metrics", "import jax.numpy as jnp", "metrics may not import jax"),
        ("trainer", "def f():\n    import seqio", "trainer may not import tensorflow"),
        ("predict", "import gin", "predict may not import tensorflow"),
        ("pages", "import orbax.checkpoint", "pages may not import jax"),
        ("models", "import torch", "models may not import torch"),
        ("losses", "import tasks.vocabulary", "losses may not import tasks"),
        ("feedback", "import scipy", "feedback may not import scipy"),
        ("train", "from richhf_jax import eval", "train may not import eval"),
        ("helpers", "import os", "helpers has no line in the table of test_imports.py"),
    ],
)
def test_a_broken_rule_is_named(name, statement, rule):
    assert broken_rules(name, imported(ast.parse(statement))) == [rule]


def run_python(code: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_the_package_itself_imports_nothing_heavy():
    run_python(
        "import importlib, sys, typing; before = set(sys.modules); import richhf_jax\n"
        "assert set(sys.modules) - before <= {'richhf_jax'}, set(sys.modules) - before"
    )


@pytest.mark.parametrize("module", ["train", "datasets", "predict", "benchmarks.steps"])
def test_ctrl_c_during_the_imports_is_a_line(module, tmp_path):
    for name in ("jax", "tensorflow_datasets", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise KeyboardInterrupt\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", f"richhf_jax.{module}"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.stderr == "interrupted\n"
    assert result.returncode == -signal.SIGINT


def test_the_core_imports_without_the_train_extra():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in SOURCES
        if path != ROOT / "richhf_jax/__init__.py" and room(path) in CORE - {"torch_twin"}
    ]
    assert "richhf_jax.models" in modules
    # It takes of `datasets` what needs none of this.
    modules += ["richhf_jax.annotate.__main__", "richhf_jax.annotate.server"]
    blocked = HEAVY["tensorflow"] | HEAVY["torch"]
    run_python(
        "import importlib, sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {blocked}:\n"
        "            raise ModuleNotFoundError(f'blocked: {name}', name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
        f"for module in {modules}:\n"
        "    importlib.import_module(module)\n"
    )


KINDS = {*feedback.SCORES, *feedback.HEATMAPS}
FIELDS = {*feedback.SCORE_FIELDS.values(), *feedback.HEATMAP_FIELDS.values(), feedback.KEYWORDS_FIELD}
TASK_STRINGS = {
    *feedback.SCORE_TASK_STRINGS.values(),
    *feedback.HEATMAP_TASK_STRINGS.values(),
    feedback.KEYWORDS_TASK_STRING,
}


def vocabulary_in(literal: str) -> set[str]:
    """The names that only feedback.py may write, in a string that is no prose.

    Prose may speak of a kind ("a misalignment region"), a key or path may not ("score/plcc/overall").
    """
    words = set(re.split(r"[^\w]+", literal))
    found = {name for name in FIELDS if name in words} | ({literal} & TASK_STRINGS)
    if not re.search(r"\s", literal):
        found |= words & KINDS
    if literal == feedback.MISALIGNED_SUFFIX:
        found.add(literal)
    return found


def literals(tree: ast.AST) -> list[ast.Constant]:
    """String constants outside docstrings."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    strings = (n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return [node for node in strings if id(node) not in docstrings]


@pytest.mark.parametrize(
    ("literal", "found"),
    [
        ("score/plcc/overall", {"overall"}),
        ("artifact_score", {"artifact_score"}),
        ("no field artifact_map in the record", {"artifact_map"}),
        ("a missing object has no misalignment region", set()),
        ("misaligned keywords", {"misaligned keywords"}),
        ("_0", {"_0"}),
        ("t5/encoder_0", set()),
    ],
)
def test_vocabulary_in_a_literal(literal, found):
    assert vocabulary_in(literal) == found


# They write numbers that were computed.
@pytest.mark.parametrize(
    "place", ["eval", "infer", "precompile", "benchmarks/*", "predict/*", "datasets/describe/__main__"]
)
def test_json_has_no_nan(place):
    calls = [
        node
        for path in (ROOT / "richhf_jax").glob(f"{place}.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dump", "json.dumps")
    ]
    assert calls
    for call in calls:
        assert "allow_nan=False" in ast.unparse(call)


def test_vocabulary_is_written_in_feedback_alone():
    found = []
    for path in SOURCES:
        if room(path) == "feedback":
            continue
        for node in literals(ast.parse(path.read_text())):
            where = f"{path.relative_to(ROOT)}:{node.lineno}"
            found += [f"{where}: {name!r} belongs to feedback.py" for name in vocabulary_in(node.value)]
    assert found == []


def test_vocabulary_is_not_written_in_templates():
    found = []
    for path in (ROOT / "richhf_jax").rglob("*.html"):
        quoted = re.findall(r"""['"]([\w ]+)['"]""", path.read_text())
        found += [f"{path.name}: {text!r} belongs to feedback.py" for text in quoted if vocabulary_in(text)]
    assert found == []


def test_files_are_where_they_belong():
    assert not [
        path for folder in ("richhf_jax", "tasks", "tests") for path in (ROOT / folder).rglob("utils.py")
    ]
    # A module there would shadow the gin package.
    assert list((ROOT / "gin").rglob("*.py")) == []
    assert {path.suffix for path in (ROOT / "gin").rglob("*") if path.is_file()} == {".gin"}
