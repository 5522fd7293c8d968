"""launch/synthetic_tables.sh with a stand-in for Python; its findings; two steps of its trainings."""

import os
import pathlib
import shlex
import subprocess

import gin
import pytest
import seqio

import richhf_jax
import tasks  # noqa: F401 (registers them)
from launch import check_tables
from richhf_jax import feedback, gin_utils, train
from richhf_jax.pages.table_formats import PAPER_TABLES, Row

SCRIPT = pathlib.Path(richhf_jax.__file__).resolve().parents[1] / "launch/synthetic_tables.sh"
# Writes each part of launch.in_turn on a line, and the tables.
FAKE_PYTHON = """#!/usr/bin/env bash
[[ $1 == -c || $2 == pip ]] && exit
shift 2
printf '%q ' "$@" | sed 's/ --then /\\n/g' >>"$LOG"
echo >>"$LOG"
for argument; do
  [[ $argument != --out=*.txt ]] || echo "the tables" >"${argument#--out=}"
done
"""


@pytest.fixture
def run(tmp_path):
    """Runs the script; returns its exit code, output and the parts, as words."""
    (tmp_path / "venv/bin").mkdir(parents=True)
    python = tmp_path / "venv/bin/python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    log = tmp_path / "log"

    def launch(*args):
        log.write_text("")
        environment = os.environ | {"VENV": str(tmp_path / "venv"), "LOG": str(log)}
        command = ["bash", str(SCRIPT), *args]
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        return (
            result.returncode,
            result.stdout + result.stderr,
            list(map(shlex.split, log.read_text().splitlines())),
        )

    return launch


def test_the_parts_in_order(run, tmp_path):
    code, output, parts = run("--out=out", "--gin.BATCH_SIZE=2")
    assert code == 0, output
    out = tmp_path / "out"
    first, imports = parts[0][:2]
    assert (first, imports) == (
        f"--finished={out}/finished",
        "richhf_jax.training_log,richhf_jax.split_predictions,tasks",
    )
    parts[0] = parts[0][2:]
    modules = [words[1].removeprefix("richhf_jax.") for words in parts[:16]]
    assert modules == [
        "datasets",
        *["train", "train", "eval"] * 2,
        "train",
        "eval",
        "eval",
        *["train", "eval"] * 3,
    ]
    runs = []
    for words in parts[1:16]:
        flags = dict(word.split("=", 1) for word in words[2:])
        assert flags["--tfds_data_dir"] == f"{out}/data"
        assert flags["--gin.BATCH_SIZE"] == "2"
        name = flags["--gin.MODEL_DIR"].strip('"').removeprefix(f"{out}/")
        start = flags.get("--gin.INITIAL_CHECKPOINT_PATH", "").strip('"').removeprefix(f"{out}/")
        runs.append((name, start, flags["--gin_file"].removeprefix("experiments/").removesuffix(".gin")))
    baselines = "synthetic_baselines"
    augmented = "quickstart_augmented_prompt"
    assert runs == [
        ("rahf_pretrain", "", "quickstart_pretrain"),
        *[("rahf", "rahf_pretrain", "quickstart")] * 2,
        ("rahf_augmented_prompt_pretrain", "", f"{augmented}_pretrain"),
        *[("rahf_augmented_prompt", "rahf_augmented_prompt_pretrain", augmented)] * 2,
        ("clip", "", f"{baselines}/clip_contrastive"),
        ("clip_score", "clip", f"{baselines}/clip_score"),
        ("clip_gradient", "clip", f"{baselines}/clip_gradient"),
        *[("clip_finetuned", "clip", f"{baselines}/clip_finetuned")] * 2,
        *[("resnet_scores", "", f"{baselines}/resnet_scores")] * 2,
        *[("resnet_heatmaps", "", f"{baselines}/resnet_heatmaps")] * 2,
    ]
    systems = {
        "rahf": "RAHF, multi-head",
        "rahf_augmented_prompt": "RAHF, augmented prompt",
        "clip_score": "CLIP",
        "clip_gradient": "CLIP gradient",
        "clip_finetuned": "CLIP, finetuned",
        "resnet_scores": "ResNet",
        "resnet_heatmaps": "ResNet",
    }
    results, names = [f"{out}/{name}" for name in systems], ["--names", *systems.values()]
    tables = parts[16:]
    tables[0], tables[3] = tables[0][1:], tables[3][1:]  # The imports.
    for words, form, suffix in zip(
        tables[:3], ("terminal", "markdown", "html"), ("txt", "md", "html"), strict=True
    ):
        flags = ["--baselines", f"--format={form}", f"--out={out}/tables.{suffix}"]
        assert words[1:] == ["richhf_jax.tables", *results, *flags, *names]
    assert tables[3][1:] == ["launch.check_tables", *results, *names]
    assert "the tables\n" in output
    assert output.index("RAHF, multi-head: pretraining, finetuning") < output.index("the tables")
    assert output.endswith(f"open {out}/tables.html\n")


def test_other_settings_need_another_folder(run):
    assert run("--out=out", "--gin.TRAIN_STEPS=20")[0] == 0
    assert run("--out=out", "--gin.TRAIN_STEPS=20")[0] == 0
    code, output, parts = run("--out=out")
    assert (code, parts) == (1, [])
    assert "begun with other settings (settings.txt: --gin.TRAIN_STEPS=20" in output


def test_help(run):
    code, output, parts = run("--help")
    assert (code, parts) == (0, [])
    assert output.startswith("Usage: bash launch/synthetic_tables.sh ")


COLUMNS = [column for table in PAPER_TABLES for column in table.columns]
ALIGNMENT = f"score/plcc/{feedback.ALIGNMENT}"


def row(name, goodness, **changes):
    """Makes a row whose figures are the better, the larger goodness is."""
    metrics = {column.key: goodness if column.higher_is_better else -goodness for column in COLUMNS}
    return Row(name, metrics | changes)


def found(rahf, resnet=0.05, clip=0.3):
    rows = [rahf, row("CLIP", 0.3, **{ALIGNMENT: clip}), row("ResNet", 0.2, **{ALIGNMENT: resnet})]
    rows += [row("trivial (training mean)", 0), row("training-free", 2)]
    return list(check_tables.findings(rows))


def test_findings_that_hold():
    findings = found(row("RAHF", 0.9))
    assert [holds for holds, _ in findings] == [True] * 3
    assert findings[0][1].endswith("|PLCC| 0.050 < 0.1")
    assert findings[1][1].endswith("PLCC 0.300 > 0.000")


def test_findings_that_do_not_hold():
    worse = {"heatmap/kld/misalignment": 5.0, "keywords/f1": 0.3}
    findings = found(row("RAHF", 0.9, **worse), resnet=-0.2, clip=-0.1)
    assert [holds for holds, _ in findings] == [False] * 3
    assert findings[2][1].splitlines()[1:] == [
        "    Table 3. Misalignment heatmap, KLD: 5.000, but CLIP has -0.300",
        "    Table 4. Misaligned keywords, F1: 30.0%, but CLIP has 30.0%",
    ]


@pytest.mark.parametrize("name", ["clip_contrastive", "resnet_scores"])
def test_two_steps_of_training(name, synthetic_data_dir, tmp_path):
    seqio.set_tfds_data_dir_override(str(synthetic_data_dir))
    bindings = [f"MODEL_DIR = '{tmp_path}'", "TRAIN_STEPS = 2", "BATCH_SIZE = 4", "EVAL_STEPS = 1"]
    bindings += ["partitioning.PjitPartitioner.num_cpu_devices = None"]  # pytest's processes have two.
    files = [f"experiments/synthetic_baselines/{name}.gin"]
    gin_utils.parse_gin_flags(gin_utils.DEFAULT_SEARCH_PATHS, files, bindings)
    gin.get_configurable(train.train)()
    assert (tmp_path / "checkpoint_2").is_dir()
