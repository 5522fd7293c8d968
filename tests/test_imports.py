"""The import rules of the architecture (who may import whom, TensorFlow, jax, gin), and where names stand."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

import richhf_jax
from richhf_jax import feedback

ROOT = pathlib.Path(richhf_jax.__file__).resolve().parents[1]

# What each module may import of the project besides `errors` and `feedback`. Only what stands above
# it, so imports point one way. A new module needs a line here.
PROJECT_IMPORTS = {
    "errors": set(),
    "feedback": set(),
    "shapes": set(),
    "network": {"shapes"},
    "costs": set(),
    "multihost": set(),
    "losses": {"shapes"},
    "decoding": {"shapes"},
    "keywords": set(),
    "inputs": set(),
    "pixels": set(),
    "optimizers": set(),
    "partitioning": set(),
    "train_state": set(),
    "models": {"losses", "decoding"},
    "checkpoints": {"train_state"},
    "trainer": {"losses", "models", "partitioning", "train_state"},
    "training_log": {"costs", "trainer"},
    "datasets": {"inputs"},
    "metrics": {"datasets"},
    "pages": set(),
    "augmentation": set(),
    "preprocessors": {"augmentation"},
    "postprocessors": set(),
    "feature_converters": {"preprocessors"},
    "input_pipeline": {"datasets", "feature_converters", "partitioning", "preprocessors"},
    # `input_pipeline` for its DatasetConfig, which baselines are given.
    "tasks": {"datasets", "input_pipeline", "metrics", "preprocessors", "postprocessors"},
    "model_description": {"network", "pixels"},
    "predict": {
        *("checkpoints", "inputs", "keywords", "model_description", "models"),
        *("pages", "partitioning", "pixels"),
    },
    "split_predictions": {
        *("checkpoints", "input_pipeline", "keywords", "models"),
        *("partitioning", "postprocessors", "trainer"),
    },
    "convert": {"checkpoints", "model_description"},
    "export": {
        *("augmentation", "checkpoints", "convert", "keywords", "model_description", "predict"),
        "preprocessors",
    },
    "benchmarks": {"datasets", "network"},
    "gin_utils": {"multihost"},
}
ENTRY_POINTS = {
    *("train", "eval", "infer", "precompile", "export.__main__", "convert.__main__"),
    *("benchmarks.input", "benchmarks.predict", "benchmarks.steps"),
}

TENSORFLOW = {"tensorflow", "tensorflow_text", "tensorflow_datasets", "seqio", "gin"}
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}
MAY_IMPORT_TENSORFLOW = (ENTRY_POINTS - {"export.__main__"}) | {
    "augmentation",
    "preprocessors",
    "postprocessors",
    "feature_converters",
    "input_pipeline",
    "datasets",
    "tasks",
    "benchmarks",
    "gin_utils",
    "split_predictions",
    "export",  # its saved_model.py and tf_vocabulary.py alone, see below
    "training_log",  # clu's writers import it
}
NEVER_IMPORT_JAX = {
    "errors",
    "feedback",
    "keywords",
    "metrics",
    "pages",
    "inputs",
    "pixels",
    "datasets",
    "augmentation",
    "preprocessors",
    "postprocessors",
    "tasks",
}
CORE = (set(PROJECT_IMPORTS) | ENTRY_POINTS) - MAY_IMPORT_TENSORFLOW

SOURCES = sorted([*(ROOT / "richhf_jax").rglob("*.py"), *(ROOT / "tasks").rglob("*.py")])


def unit(path: pathlib.Path) -> str:
    """The table's name for a file: its module, folder (`network`, `datasets`), entry point or `tasks`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if (entry_point := ".".join(parts[1:])) in ENTRY_POINTS:
        return entry_point
    return parts[0] if parts[0] == "tasks" else parts[1]


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


def broken_rules(name: str, imports: set[str]) -> list[str]:
    """What is wrong with the imports of the unit `name`."""
    top_level = {module.split(".")[0] for module in imports}
    project = {module.split(".")[1] for module in imports if module.startswith("richhf_jax.")}
    project |= top_level & {"tasks"}
    if name in ENTRY_POINTS:
        allowed = set(PROJECT_IMPORTS)
    elif name in PROJECT_IMPORTS:
        shared = {"errors", "feedback"} if name not in ("errors", "feedback", "network") else {"feedback"}
        allowed = PROJECT_IMPORTS[name] | shared
    else:
        return [f"{name} has no line in the table of {pathlib.Path(__file__).name}"]
    broken = [f"{name} may not import {other}" for other in sorted(project - allowed - {name})]
    if name not in MAY_IMPORT_TENSORFLOW:
        broken += [f"{name} may not import {module}" for module in sorted(top_level & TENSORFLOW)]
    if name in NEVER_IMPORT_JAX:
        broken += [f"{name} may not import {module}" for module in sorted(top_level & JAX)]
    if name in ("errors", "feedback"):
        third_party = top_level - sys.stdlib_module_names - {"numpy", "richhf_jax"}
        broken += [f"{name} may not import {module}" for module in sorted(third_party)]
    return broken


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_table(path):
    imports = imported(ast.parse(path.read_text()))
    if path == ROOT / "richhf_jax/__init__.py":
        assert imports == {"importlib", "typing.Any"}
    else:
        assert broken_rules(unit(path), imports) == []


def test_the_table_points_one_way():
    above = set()
    for name, allowed in PROJECT_IMPORTS.items():
        assert allowed <= above, name
        above.add(name)


@pytest.mark.parametrize(
    ("name", "statement", "rule"),
    [
        ("models", "from richhf_jax.network import t5", "models may not import network"),
        ("network", "from richhf_jax import errors", "network may not import errors"),
        ("metrics", "import jax.numpy as jnp", "metrics may not import jax"),
        ("trainer", "def f():\n    import seqio", "trainer may not import seqio"),
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


def test_the_core_imports_without_the_train_extra():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in SOURCES
        if path != ROOT / "richhf_jax/__init__.py" and unit(path) in CORE
    ]
    assert "richhf_jax.models" in modules
    run_python(
        "import importlib, sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {TENSORFLOW}:\n"
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


def test_vocabulary_is_written_in_feedback_alone():
    found = []
    for path in SOURCES:
        if unit(path) == "feedback":
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
