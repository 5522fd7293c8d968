"""The command that puts evaluations side by side."""

import csv
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import richhf_jax
from richhf_jax import errors, feedback, image_values, metrics, tables
from richhf_jax.image_values import ImageValues

ROOT = pathlib.Path(richhf_jax.__file__).resolve().parents[1]
IMAGES = 40
SCORE, KIND = feedback.OVERALL, feedback.MISALIGNMENT


def evaluation(title: str = "RAHF", noise: float = 0.1, seed: int = 0, **changes) -> ImageValues:
    """Makes the values of an evaluation with one score, one heatmap and a baseline."""
    rng = np.random.default_rng(1)
    target = rng.uniform(size=IMAGES)
    targets = {
        f"score/{SCORE}": target,
        f"heatmap/pixels/{KIND}": np.full(IMAGES, 64.0),
        f"heatmap/fixated/{KIND}": rng.integers(0, 9, IMAGES).astype(float),
    }
    rng = np.random.default_rng(seed)
    model = {
        f"score/{SCORE}": target + noise * rng.standard_normal(IMAGES),
        f"heatmap/mse/{KIND}": rng.uniform(size=IMAGES),
    }
    trivial = {f"score/{SCORE}": np.full(IMAGES, 0.5)}
    ids = [f"test/{i}.png" for i in range(IMAGES)]
    values = ImageValues("my_task", "test", 7, ids, targets, {title: model, "trivial": trivial})
    return dataclasses.replace(values, **changes)


def write(folder: pathlib.Path, values: ImageValues) -> str:
    """Writes what an evaluation writes of its figures."""
    folder.mkdir(parents=True)
    values.write(folder)
    found = metrics.aggregate(values.targets, next(iter(values.systems.values())))
    (folder / "metrics.json").write_text(json.dumps(found | {"num_examples": len(values.ids)}))
    return str(folder)


def in_order(values: ImageValues, order: np.ndarray) -> ImageValues:
    def take(columns):
        return {name: column[order] for name, column in columns.items()}

    systems = {name: take(columns) for name, columns in values.systems.items()}
    ids = [values.ids[i] for i in order]
    return dataclasses.replace(values, ids=ids, targets=take(values.targets), systems=systems)


@pytest.fixture
def two(tmp_path) -> list[str]:
    """Writes two evaluations; the second has its images in another order."""
    second = in_order(evaluation("ResNet, 50", 0.5, 1), np.random.default_rng(2).permutation(IMAGES))
    return [write(tmp_path / "one", evaluation()), write(tmp_path / "two", second)]


def refusal(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        tables.main(arguments)
    assert capsys.readouterr().out == ""
    return str(stop.value)


def test_evaluations_stand_side_by_side(two, capsys):
    tables.main(two)
    lines = capsys.readouterr().out.splitlines()
    models = [evaluation(), evaluation("ResNet, 50", 0.5, 1)]
    rows = [metrics.aggregate(one.targets, next(iter(one.systems.values()))) for one in models]
    for line, row in zip(lines[3:5], rows, strict=True):
        assert line.split()[-2:] == [f"{row[f'score/{name}/{SCORE}']:.3f}" for name in ("plcc", "srcc")]
    assert [line.split("  ")[0] for line in lines[3:5]] == ["RAHF", "ResNet, 50"]
    assert lines[-1] == "40 images of my_task, test."


def test_names_baselines_and_published_rows_as_csv(two, tmp_path, capsys):
    out = tmp_path / "tables.csv"
    tables.main(
        [
            *two,
            "--names",
            "=a",
            "b",
            "--baselines",
            "--published",
            "--format=csv",
            "--bootstrap=50",
            f"--out={out}",
        ]
    )
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n"
    assert "looks like a formula" in printed.err
    rows = list(csv.DictReader(out.read_text(encoding="utf-8").splitlines()))
    assert [row["system"] for row in rows[:4]] == ["=a", "b", "trivial", "ResNet-50"]
    assert [bool(row["source"]) for row in rows] == [False] * 3 + [True] * (len(rows) - 3)
    key = f"score/plcc/{SCORE}"
    exact = metrics.aggregate(evaluation().targets, evaluation().systems["RAHF"])[key]
    assert float(rows[0][key]) == exact
    assert float(rows[0][f"{key}/low"]) < exact < float(rows[0][f"{key}/high"])
    # Noise of 0.5 in place of 0.1 is beyond chance with 40 images; the heatmaps of both are noise.
    assert [row[f"{key}/differs"] for row in rows[:4]] == ["", "True", "True", ""]
    assert [row[f"heatmap/mse/{KIND}/differs"] for row in rows[:4]] == ["", "False", "", ""]


def test_resamples_are_of_the_seed(two):
    rows = [tables.make(two, resamples=20, seed=seed)[0] for seed in (0, 0, 1)]
    assert rows[0] == rows[1]
    assert rows[0] != rows[2]
    # A system differs in nothing from itself.
    [_, same], _ = tables.make([two[0], two[0]], resamples=20)
    assert set(same.differs.values()) == {False}


def test_the_newest_result_of_a_model_dir(tmp_path):
    place = tmp_path / "model/inference_eval/my_task/test"
    for step, title in ((9, "newest"), (10, "older")):
        os.utime(write(place / str(step), evaluation(title)) + "/metrics.json", (step, 100 - step))
    rows, _ = tables.make([str(tmp_path / "model")])
    assert [row.name for row in rows] == ["newest"]


def test_a_model_without_heatmaps_needs_none_in_its_data(two, tmp_path):
    full = evaluation()
    targets = {f"score/{SCORE}": full.targets[f"score/{SCORE}"]}
    scores = {"scores": {f"score/{SCORE}": full.systems["RAHF"][f"score/{SCORE}"]}}
    bare = write(tmp_path / "bare", evaluation(targets=targets, systems=scores))
    small = full.targets | {f"heatmap/pixels/{KIND}": np.full(IMAGES, 16.0)}
    other = write(tmp_path / "small", evaluation(targets=small, systems=scores))
    rows, _ = tables.make([bare, other, two[1]])
    assert [f"heatmap/mse/{KIND}" in row.metrics for row in rows] == [False, False, True]


@pytest.mark.parametrize("last", [0, 1])
def test_a_row_is_measured_on_targets_of_its_own(tmp_path, last):
    full = evaluation()
    heatmap = {"map": {f"heatmap/mse/{KIND}": full.systems["RAHF"][f"heatmap/mse/{KIND}"]}}
    others = full.targets | {f"score/{SCORE}": np.random.default_rng(5).uniform(size=IMAGES)}
    places = [write(tmp_path / "full", full)]
    places.insert(last, write(tmp_path / "map", evaluation(targets=others, systems=heatmap)))
    rows, _ = tables.make(places)
    (alone,), _ = tables.make([str(tmp_path / "full")])
    assert rows[1 - last].metrics == alone.metrics


def test_no_file_of_an_evaluation_is_overwritten(two, capsys):
    before = pathlib.Path(two[1], "metrics.json").read_bytes()
    message = refusal([*two, f"--out={two[1]}/metrics.json"], capsys)
    assert "metrics.json is a file of an evaluation: name another file" in message
    assert pathlib.Path(two[1], "metrics.json").read_bytes() == before
    message = refusal([*two, f"--out={two[1]}"], capsys)
    assert f"{two[1]}: Is a directory. Name a file, for instance one inside it" in message
    for _ in range(2):
        tables.main([*two, f"--out={two[1]}/tables.txt"])


def test_a_file_without_a_systems_targets_is_damaged(tmp_path, capsys):
    place = write(tmp_path / "one", evaluation())
    targets = {f"heatmap/pixels/{KIND}": evaluation().targets[f"heatmap/pixels/{KIND}"]}
    evaluation(targets=targets).write(tmp_path / "one")
    message = refusal([place], capsys)
    assert f"{image_values.FILE} is damaged: it lacks 'score/{SCORE}'. Evaluate again" in message


def test_other_images_or_targets_are_refused(two, tmp_path, capsys):
    other = evaluation(split="validation", ids=[f"validation/{i}.png" for i in range(IMAGES)])
    path = write(tmp_path / "validation", other)
    message = refusal([two[0], path], capsys)
    assert f"{two[0]} (my_task, test) and {path} (my_task, validation) are of different images" in message
    assert "lacks 40, such as 'validation/0.png'. Evaluate both on the same split" in message
    part = in_order(evaluation(), np.arange(30))
    message = refusal([two[0], write(tmp_path / "part", part)], capsys)
    assert "part lacks 10, such as 'test/30.png'" in message
    targets = evaluation().targets
    changed = targets | {f"heatmap/pixels/{KIND}": np.full(IMAGES, 16.0)}
    message = refusal([*two, write(tmp_path / "small", evaluation(targets=changed))], capsys)
    assert f"different targets: heatmap/pixels/{KIND} of 'test/0.png' is 64 and 16. Evaluate both" in message
    unlabelled = targets[f"score/{SCORE}"].copy()
    unlabelled[3] = np.nan
    model = evaluation().systems["RAHF"]
    systems = {
        "RAHF": model | {f"score/{SCORE}": np.where(np.isnan(unlabelled), np.nan, model[f"score/{SCORE}"])}
    }
    changed = evaluation(targets=targets | {f"score/{SCORE}": unlabelled}, systems=systems)
    message = refusal([two[0], write(tmp_path / "nan", changed)], capsys)
    assert f"score/{SCORE} of 'test/3.png' is " in message
    assert " and nan. " in message


def test_two_images_of_one_name(two, tmp_path, capsys):
    twins = evaluation(ids=["a", "a", *evaluation().ids[2:]])
    one = write(tmp_path / "twins", twins)
    assert len(tables.make([one, one])[0]) == 2
    shuffled = write(tmp_path / "shuffled", in_order(twins, np.arange(IMAGES)[::-1]))
    assert "two images have one name" in refusal([one, shuffled], capsys)


def test_missing_and_damaged_files(two, tmp_path, capsys):
    assert "name a folder of results, or a MODEL_DIR" in refusal([str(tmp_path / "none")], capsys)
    folder = pathlib.Path(two[0])
    values, figures = folder / image_values.FILE, folder / "metrics.json"
    whole, text = values.read_bytes(), figures.read_text()
    flipped = bytearray(whole)
    flipped[whole.index(f"0/score/{SCORE}.npy".encode()) + 100] ^= 1
    for damaged in (b"", b"no zip", whole[:-100], bytes(flipped)):
        values.write_bytes(damaged)
        message = refusal(two, capsys)
        assert f"{values} is damaged" in message
        assert "Evaluate again: python -m richhf_jax.eval" in message
    values.unlink()
    assert f"{folder} has no {image_values.FILE}: it is no evaluation, or an older one" in refusal(
        two, capsys
    )
    values.write_bytes(whole)
    figures.write_text(text[:-5])
    assert f"{figures} is truncated, or no JSON" in refusal(two, capsys)
    key = f"score/plcc/{SCORE}"
    for changed in (json.loads(text) | {key: 0.5}, json.loads(text) | {key: None}, {}):
        figures.write_text(json.dumps(changed))
        message = refusal(two, capsys)
        assert f"{folder}: " in message
        assert "in metrics.json but" in message
        assert "of different evaluations. Evaluate again" in message


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"target/x": np.zeros(3)}, "target/x is no list of 40 numbers"),
        ({"0/x": np.full(IMAGES, np.inf)}, "0/x is no list"),
        ({"0/x": np.zeros(IMAGES, np.int64)}, "0/x is no list"),
        ({"5/x": np.zeros(IMAGES)}, "5/x is of a system that it doesn't name"),
        ({"ids": np.array([{}] * IMAGES)}, "pickle"),
        ({"systems": np.array(["a", "a"])}, "no images, or no systems"),
        ({"ids": None}, "'ids'"),
    ],
)
def test_a_file_of_other_arrays(tmp_path, changes, reason):
    evaluation().write(tmp_path)
    with np.load(tmp_path / image_values.FILE) as arrays:
        content = dict(arrays) | changes
    kept = {name: array for name, array in content.items() if array is not None}
    np.savez(tmp_path / image_values.FILE, **kept)
    with pytest.raises(errors.UserError, match=f"is damaged: .*{reason}"):
        image_values.read(tmp_path)


def test_flags_are_checked_before_anything_is_read(two, tmp_path, capsys):
    for flags, reason in (
        (["--names", "a"], "1 names for 2 DIRs"),
        (["--names", "a", ""], "a name is empty"),
        (["--bootstrap=-1"], "takes 40 to 100,000 resamples"),
        (["--bootstrap=39"], "takes 40 to 100,000 resamples"),
        (["--bootstrap=100001"], "takes 40 to 100,000 resamples"),
        (["--seed=-1"], "can't be below 0"),
    ):
        with pytest.raises(SystemExit):
            tables.main([*two, *flags])
        assert reason in capsys.readouterr().err
    assert "No such file or directory" in refusal([*two, f"--out={tmp_path}/none/t.md"], capsys)


def test_neither_jax_nor_tensorflow_is_loaded(two):
    code = (
        "import sys; from richhf_jax import tables\n"
        f"tables.main([{two[0]!r}, '--bootstrap=50', '--format=html'])\n"
        "assert not {'jax', 'jaxlib', 'flax', 'tensorflow'} & set(sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
