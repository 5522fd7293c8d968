"""Suggestions: from predict's files to what a rater may see, and never before their own answer."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from richhf_jax import feedback
from richhf_jax.annotate import __main__ as command
from richhf_jax.annotate import commands, suggestions, transfer
from richhf_jax.annotate.store import Store
from richhf_jax.datasets import consolidate
from richhf_jax.predict import files as prediction_files
from richhf_jax.predict import names, predictor

WIDTH, HEIGHT = 300, 200
RADIUS = feedback.POINT_RADIUS * HEIGHT
PROMPT = "A red cat, happy"
SCORES = {"plausibility": 0.12, "alignment": 0.13, "aesthetics": 0.875, "overall": 1.0}
# 1 + 4 score is 1.48, 1.52, 4.5 and 5.
RATINGS = {"plausibility": 1, "alignment": 2, "aesthetics": 5, "overall": 5}
MIDDLE = (150.0, 80.0)


def disks(*points, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Draws a rater's heatmap."""
    radius = feedback.POINT_RADIUS * height
    return consolidate.point_heatmap(points, height, width, radius).astype(np.float32)


@pytest.mark.parametrize("scale", [1, 7.3, 20])
def test_a_raters_points_come_back(scale, rng):
    height, width = int(HEIGHT * scale), int(WIDTH * scale)
    grid = [(x, y) for x in range(40, 300, 70) for y in (30, 85, 160)][:10]
    given = (np.array(grid) + rng.uniform(-9, 9, (10, 2))) * scale
    found = suggestions.points(disks(*given, height=height, width=width), feedback.POINT_RADIUS)
    assert len(found) == len(given)
    apart = np.array(found) - given[:, None]  # [given, found, 2]
    errors = np.take_along_axis(apart, np.linalg.norm(apart, axis=-1).argmin(1)[:, None, None], 1)[:, 0]
    # A point is the middle of a square; on average it is neither too far left nor too far right.
    square = max(1, RADIUS * scale / 10)
    assert np.abs(errors).max() < 0.75 * square
    assert np.abs(errors.mean(axis=0)).max() < 0.25 * square


def test_points_at_the_edge_stay_in_the_image():
    given = [(0, 0), (WIDTH - 1, 60), (250, HEIGHT - 1)]
    for found, place in zip(
        sorted(suggestions.points(disks(*given), feedback.POINT_RADIUS)),
        sorted(given),
        strict=True,
    ):
        assert found == pytest.approx(place, abs=RADIUS / 2)
        assert 0 <= found[0] <= WIDTH - 1
        assert 0 <= found[1] <= HEIGHT - 1


def test_a_point_is_what_half_of_the_raters_would_mark():
    of_raters = [disks(MIDDLE), disks(MIDDLE, (50, 50)), disks((50, 50)), disks((250, 150))]
    heatmap = consolidate.mean_heatmap([rater > 0 for rater in of_raters]) / np.float32(255)
    found = suggestions.points(heatmap, feedback.POINT_RADIUS)
    assert sorted(found) == [pytest.approx((50, 50), abs=1), pytest.approx(MIDDLE, abs=1)]
    assert suggestions.points(heatmap * 0.98, feedback.POINT_RADIUS) == []


def test_the_strongest_points_are_taken():
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    places = [(x, y) for x in range(30, 300, 60) for y in (40, 100, 160)]
    heatmap = np.max(
        [
            (0.6 + 0.02 * i) * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 200)
            for i, (x, y) in enumerate(places)
        ],
        axis=0,
    )
    found = suggestions.points(heatmap, feedback.POINT_RADIUS)
    assert found == [pytest.approx(place, abs=1.5) for place in places[:-11:-1]]


@pytest.mark.parametrize(("level", "count"), [(0, 0), (0.49, 0), (1, 1)])
def test_a_level_heatmap_has_one_point_at_most(level, count):
    found = suggestions.points(np.full((HEIGHT, WIDTH), level, np.float32), feedback.POINT_RADIUS)
    assert found == [pytest.approx((WIDTH / 2, HEIGHT / 2), abs=1)] * count


def prediction(name: str, **changes) -> predictor.Prediction:
    heatmaps = {"implausibility": 0.9 * disks(MIDDLE), "misalignment": 0.3 * disks((20, 30))}
    values = {
        "id": name,
        "prompt": PROMPT,
        "scores": SCORES,
        "heatmaps": heatmaps,
        "tokens": feedback.label_tokens(PROMPT, [1, 0, 1, 1]),
        "picture": np.zeros((HEIGHT, WIDTH, 3), np.uint8),
        "size": (HEIGHT, WIDTH),
        "words_cut": 0,
    }
    return predictor.Prediction(**values | changes)


def write(out: pathlib.Path, *predictions: predictor.Prediction, heatmaps: str = "png") -> pathlib.Path:
    """Writes predictions as predict does. Returns the path of predictions.jsonl."""
    shutil.rmtree(out, ignore_errors=True)
    with prediction_files.PredictionFiles(str(out), {"checkpoint": "c"}, 0, heatmaps) as files:
        for i, one in enumerate(predictions):
            files.commit(i + 1, [files.save(i, names.file_name(one.id), one)])
        files.finish("title")
    return out / prediction_files.PREDICTIONS


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as end:
        command.main([str(argument) for argument in arguments])
    return end.value.code


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / f"{i} #.png")
        (folder / f"{i} #.txt").write_text(PROMPT)
    return folder


def suggested(project) -> dict:
    store = Store(project)
    found = {item.id: item.suggestion for item in store.items()}
    store.close()
    return found


@pytest.mark.parametrize("heatmaps", prediction_files.HEATMAP_FORMATS)
def test_predictions_become_suggestions(tmp_path, images, heatmaps, capsys):
    file = write(tmp_path / "out", prediction("0 #.png"), heatmaps=heatmaps)
    project = tmp_path / "project"
    assert run("init", project, "--images", images, "--suggest", file) == 0
    assert "1 images have a suggestion" in capsys.readouterr().out
    expected = {"token_labels": [1, 0, 1, 1], "ratings": RATINGS}
    if heatmaps != "none":
        expected |= {"implausibility_points": [pytest.approx(MIDDLE, abs=1)], "misalignment_points": []}
    assert suggested(project) == {"0 #.png": expected, "1 #.png": None, "2 #.png": None}
    # Another model's take the place of the first one's, and images may get theirs later.
    others = [prediction(f"{i} #.png", scores={}, tokens=None) for i in (0, 1)]
    assert run("add", project, "--suggest", write(tmp_path / "other", *others)) == 0
    found = suggested(project)
    assert found["0 #.png"] == found["1 #.png"]
    assert found["0 #.png"].keys() == {"implausibility_points", "misalignment_points"}


def test_an_output_that_is_missing_is_not_suggested(tmp_path, images):
    file = write(
        tmp_path / "out",
        prediction("0 #.png", scores={"overall": 0.5}, heatmaps={}, tokens=None),
        prediction("1 #.png", heatmaps={}, words_cut=1),
        prediction("2 #.png", scores={}, heatmaps={}, tokens=None),
    )
    assert run("init", tmp_path / "project", "--images", images, "--suggest", file) == commands.SOME_FAILED
    assert suggested(tmp_path / "project") == {
        "0 #.png": {"ratings": {"overall": 3}},
        "1 #.png": {"ratings": RATINGS},
        "2 #.png": None,
    }


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"id": "elsewhere.png"}, "elsewhere.png: a prediction, but no image"),
        ({"prompt": "A red dog, happy"}, "0 #.png: its prediction is for another prompt"),
        ({"image_size": [HEIGHT, WIDTH]}, "of another size"),
        ({"scores": {"overall": 1.5}}, "overall must be a number from 0 to 1, got 1.5"),
        ({"scores": {"overall": True}}, "overall must be a number"),
        ({"scores": [1]}, "scores must be an object"),
        ({"tokens": [{"text": "A", "misaligned": False}]}, "tokens aren't the prompt's"),
        ({"tokens": 7}, "tokens aren't the prompt's"),
        ({"heatmaps": {"implausibility": "heatmaps/none.png"}}, "heatmaps/none.png: No such file"),
        ({"heatmaps": {"implausibility": "../project/images/x.png"}}, "is no place of a heatmap"),
        ({"heatmaps": {"implausibility": "heatmaps.npz#x"}}, "keep heatmaps.npz beside"),
        ({"heatmaps": {"implausibility": "heatmaps/small.png"}}, "a heatmap of another size"),
        ({"heatmaps": {"implausibility": "predictions.jsonl"}}, "left out: 0 #.png: "),
    ],
)
def test_a_prediction_that_does_not_fit_is_left_out(tmp_path, images, changes, told, capsys):
    file = write(tmp_path / "out", prediction("0 #.png"), prediction("1 #.png"))
    Image.new("L", (30, 20)).save(file.parent / "heatmaps/small.png")
    first, second = file.read_text().splitlines()
    file.write_text(json.dumps(json.loads(first) | changes) + "\n" + second)
    assert run("init", tmp_path / "project", "--images", images, "--suggest", file) == commands.SOME_FAILED
    assert told in capsys.readouterr().err
    assert [name for name, found in suggested(tmp_path / "project").items() if found] == ["1 #.png"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no prediction in it"),
        ("{", "predictions.jsonl:1: "),
        ('{"image": "a.png"}', "predictions.jsonl:1: no prediction; give the predictions.jsonl"),
        ('{"id": 1, "prompt": "", "image_size": []}', "1: `id` 1 is no text"),
        ('{"id": "a", "prompt": "", "image_size": []}\n' * 2, "2: `id` 'a' is no text, or was there before"),
    ],
)
def test_a_file_without_predictions_is_refused(tmp_path, images, text, told):
    (tmp_path / "predictions.jsonl").write_text(text)
    arguments = (
        "init",
        tmp_path / "project",
        "--images",
        images,
        "--suggest",
        tmp_path / "predictions.jsonl",
    )
    assert told in run(*arguments)
    assert not (tmp_path / "project").exists()
    (tmp_path / "heatmaps.npz").write_bytes(b"no archive")
    (tmp_path / "predictions.jsonl").write_text(json.dumps({"id": "a", "prompt": "", "image_size": []}))
    assert "heatmaps.npz is damaged" in run(*arguments)


def answer(work) -> dict:
    return {
        **work.answer,
        "nothing": dict.fromkeys(work.answer["nothing"], True),
        "ratings": dict.fromkeys(feedback.SCORES, 3),
    }


@pytest.fixture
def rated(tmp_path, images):
    """Ada sees a suggestion on the first two images, and changes her answer on the second one."""
    file = write(tmp_path / "out", *(prediction(f"{i} #.png") for i in range(2)))
    assert run("init", tmp_path / "project", "--images", images, "--suggest", file) == 0
    store = Store(tmp_path / "project")
    ada = store.person(store.add_rater("Ada"))
    while work := store.next_item(ada):
        first = answer(work)
        if found := store.finish(ada, work.item.id, 0, first, 1.0):
            points = [[150, 80]] if work.item.id[0] == "1" else []
            last = first | {"implausibility_points": points}
            store.finish(ada, work.item.id, found["revision"], last, 2.0)
    store.close()
    return tmp_path / "project"


def lines_of(path) -> dict[str, dict]:
    return {line["image_id"]: line for line in map(json.loads, path.read_text().splitlines())}


def test_exports_tell_of_suggestions(rated, tmp_path):
    raw, first = tmp_path / "raw.jsonl", tmp_path / "first.jsonl"
    run("export", rated, raw)
    run("export", rated, first, "--first-answers")
    found = lines_of(raw)
    assert [found[f"{i} #.png"].get("suggested") for i in range(3)] == [True, True, None]
    assert found["1 #.png"]["implausibility_points"] == [[150, 80]]
    found = lines_of(first)
    assert [line.get("suggested") for line in found.values()] == [None] * 3
    assert found["1 #.png"]["implausibility_points"] == []
    consolidate.main([str(raw), str(tmp_path / "records.tfrecord")])
    run("export", rated, tmp_path / "scores.csv", "--format=scores")
    rows = [line.split(",") for line in (tmp_path / "scores.csv").read_text().splitlines()]
    assert {row[0]: row[-1] for row in rows} == {
        "image": "suggested", "0 #.png": "1", "1 #.png": "1", "2 #.png": "0"
    }  # fmt: skip


@pytest.mark.parametrize("form", ["raw", "label-studio"])
def test_imported_answers_tell_of_suggestions(rated, images, tmp_path, form, capsys):
    out = tmp_path / ("out.json" if form == "label-studio" else "out.jsonl")
    run("export", rated, out, "--names", f"--format={form}")
    run("init", tmp_path / "again", "--images", images)
    assert run("import", tmp_path / "again", out) == 0
    for project in (rated, tmp_path / "again"):
        run("export", project, project / "raw.jsonl", "--names")
    assert lines_of(rated / "raw.jsonl") == lines_of(tmp_path / "again" / "raw.jsonl")
    # Their first answers aren't known.
    capsys.readouterr()
    assert run("export", tmp_path / "again", tmp_path / "first.jsonl", "--first-answers") == 0
    assert lines_of(tmp_path / "first.jsonl").keys() == {"2 #.png"}
    assert "left out: 2 imported answers that followed a suggestion" in capsys.readouterr().err


def test_label_studio_gets_suggestions_as_predictions(rated):
    store = Store(rated)
    tasks = {task["data"]["id"]: task for task in transfer.label_studio_tasks(store)}
    config = transfer.label_studio_config(store)
    store.close()
    assert "predictions" not in tasks["2 #.png"]
    ((first),) = tasks["0 #.png"]["predictions"]
    assert first["model_version"]
    values = {}
    for result in first["result"]:
        assert f'name="{result["from_name"]}"' in config
        values[result["from_name"]] = result["value"]
    (x, y) = suggested(rated)["0 #.png"]["implausibility_points"][0]
    assert values.pop("points") == {
        "x": pytest.approx(100 * (x + 0.5) / WIDTH),
        "y": pytest.approx(100 * (y + 0.5) / HEIGHT),
        "width": 1,
        "keypointlabels": ["implausibility"],
    }
    assert values.pop("token_1") == {"choices": ["misaligned"]}
    assert values == {kind: {"rating": rating} for kind, rating in RATINGS.items()}


def test_a_gold_image_without_a_suggestion_is_warned_of(rated, images, tmp_path, capsys):
    run("export", rated, tmp_path / "raw.jsonl")
    (tmp_path / "gold.jsonl").write_text(
        "".join(
            json.dumps(line) + "\n"
            for name, line in lines_of(tmp_path / "raw.jsonl").items()
            if name[0] != "2"
        )
    )
    file = write(tmp_path / "out", prediction("2 #.png"))
    run("init", tmp_path / "again", "--images", images, "--gold", tmp_path / "gold.jsonl")
    path = tmp_path / "again/config.json"
    path.write_text(path.read_text().replace('"calibration_items": 5', '"calibration_items": 1'))
    capsys.readouterr()
    run("add", tmp_path / "again", "--suggest", file)
    assert "1 gold images behind the first round have no suggestion" in capsys.readouterr().err
    run("add", tmp_path / "again", "--suggest", write(tmp_path / "out", prediction("1 #.png")))
    assert "gold images" not in capsys.readouterr().err
