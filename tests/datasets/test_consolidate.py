"""Tests consolidation: worked examples, and every kind of bad line given to the command."""

import copy
import io
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from richhf_jax import errors, feedback
from richhf_jax.datasets import consolidate, ratings

LINE = {
    "image_id": "train/1.png",
    "prompt": "A red cat, asleep",
    "rater_id": "ann",
    "image_size": {"width": 50, "height": 40},
    "implausibility_points": [[10, 12.5]],
    "misalignment_points": [],
    "token_labels": [1, 0, 1, 1],
    "ratings": {"plausibility": 1, "alignment": 2, "aesthetics": 3, "overall": 5},
    "tool_version": "1.0",
    "point_radius": "height/20",
}


def line(**changes) -> dict:
    return {**copy.deepcopy(LINE), **changes}


def without(field: str) -> dict:
    return {name: value for name, value in LINE.items() if name != field}


def rating_of(kind: str, value) -> dict:
    return line(ratings={**LINE["ratings"], kind: value})


def read_map(png: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(png))
    assert (image.format, image.mode) == ("PNG", "L")
    return np.asarray(image)


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "richhf_jax.datasets.consolidate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def write_raw(path: pathlib.Path, lines: list) -> pathlib.Path:
    path.write_text(
        "".join(text if isinstance(text, str) else f"{json.dumps(text)}\n" for text in lines),
        encoding="utf-8",
    )
    return path


@pytest.mark.parametrize("radius", [0.4, 2.0, 3.2])
def test_disks_are_the_pixels_within_the_radius_of_a_point(rng, radius):
    points = [(0, 0), (29, 19), *(rng.uniform(0, (29, 19), (4, 2)).round(1).tolist())]
    expected = np.zeros((20, 30), bool)
    for row in range(20):
        for column in range(30):
            expected[row, column] = any(np.hypot(column - x, row - y) <= radius for x, y in points)
    np.testing.assert_array_equal(consolidate.point_heatmap(points, 20, 30, radius), expected)


def test_a_disk_of_radius_two_pixel_by_pixel():
    expected = [[0, 0, 1, 0, 0], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0], [0, 0, 1, 0, 0]]
    heatmap = consolidate.point_heatmap([(2, 2)], height=5, width=5, radius=2)
    np.testing.assert_array_equal(heatmap.astype(int), expected)


def test_heatmap_is_the_raters_mean_and_overlapping_disks_of_one_rater_count_once():
    raters = [
        line(rater_id="ann", implausibility_points=[[10, 10], [11, 10]]),
        line(rater_id="bob", implausibility_points=[[11, 10]]),
        line(rater_id="cid", implausibility_points=[]),
    ]
    (record,) = consolidate.consolidate_lines(map(json.dumps, raters))
    heatmap = read_map(record["artifact_map"])
    assert heatmap.shape == (40, 50)
    # The radius is 40 / 20 = 2 pixels: (8, 10) is only in Ann's first disk, (11, 10) in all three.
    assert (heatmap[10, 8], heatmap[10, 11], heatmap[10, 14], heatmap[10, 7]) == (85, 170, 0, 0)
    assert not read_map(record["misalignment_map"]).any()


def test_point_radius_rule_is_followed():
    (record,) = consolidate.consolidate_lines([json.dumps(line(point_radius="height/10"))])
    assert read_map(record["artifact_map"])[12, 13] == 255
    assert read_map(record["artifact_map"])[12, 14] == 0  # (3.97, 0.5) away; the radius is 4


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ([[1, 0, 0], [1, 0, 1], [0, 0, 1]], [1, 0, 1]),
        ([[1, 0, 0], [1, 1, 0]], [1, 1, 0]),  # ties are aligned
        ([[0, 1, 0]], [0, 1, 0]),
    ],
)
def test_majority_vote(votes, expected):
    assert consolidate.majority_labels(votes) == expected


def test_record_has_the_eight_fields_of_richhf_18k():
    raters = [
        line(rater_id="ann", ratings=dict.fromkeys(feedback.SCORES, 1)),
        line(rater_id="bob", ratings=dict.fromkeys(feedback.SCORES, 3)),
        line(rater_id="cid", ratings={**dict.fromkeys(feedback.SCORES, 5), "overall": 4}),
    ]
    (record,) = consolidate.consolidate_lines(map(json.dumps, raters))
    del record["artifact_map"], record["misalignment_map"]
    assert record == {
        "filename": "train/1.png",
        "artifact_score": 0.5,
        "misalignment_score": 0.5,
        "aesthetics_score": 0.5,
        "overall_score": pytest.approx((0 + 0.5 + 0.75) / 3),
        "prompt_misalignment_label": "1 0 1 1",
    }


def test_images_keep_the_order_of_their_first_lines():
    raw = [line(image_id="b"), line(image_id="a"), line(image_id="b", rater_id="bob")]
    records = consolidate.consolidate_lines(map(json.dumps, raw))
    assert [record["filename"] for record in records] == ["b", "a"]


def test_whole_numbers_that_pandas_wrote_as_floats():
    floats = line(
        image_size={"width": 50.0, "height": 40.0},
        token_labels=[float(label) for label in LINE["token_labels"]],
        ratings={kind: float(value) for kind, value in LINE["ratings"].items()},
    )
    rating = ratings.parse_rating(json.dumps(floats))
    assert rating == ratings.parse_rating(json.dumps(LINE))
    assert rating.to_json() == json.dumps(LINE)


def test_raw_ratings_from_a_pipe_are_refused(tmp_path):
    os.mkfifo(tmp_path / "raw.jsonl")
    with pytest.raises(errors.UserError, match="raw.jsonl: not a file"):
        consolidate.consolidate_file(tmp_path / "raw.jsonl", tmp_path / "out.tfrecord")


def test_json_round_trip():
    rating = ratings.parse_rating(json.dumps(LINE))
    assert ratings.parse_rating(rating.to_json()) == rating
    assert json.loads(rating.to_json()) == LINE


BAD_LINES = [
    (without("rater_id"), "rater_id is missing"),
    (line(rater_id=" "), "rater_id is empty"),
    (line(rater_id=7), "rater_id must be a string, got 7"),
    (line(implausibility_points=[[50, 3]]), "point [50, 3] is outside the image of 50 x 40 pixels"),
    (line(misalignment_points=[[3, -0.5]]), "misalignment_points: point [3, -0.5] is outside the image"),
    (line(misalignment_points=[[3, 40]]), "point [3, 40] is outside"),
    (line(misalignment_points=[[3]]), "must be a list of [x, y], got [3] in it"),
    (line(misalignment_points=[[True, 3]]), "must be a list of [x, y], got [true, 3] in it"),
    (line(misalignment_points={"x": 3}), "misalignment_points must be a list"),
    (line(misalignment_points=[[3, 3]] * 1001), "misalignment_points has 1001 points; at most 1000"),
    (line(image_size=[float("inf")]), "image_size must be an object, got [Infinity]"),
    (line(image_size={"width": float("nan"), "height": 1}), "image_size.width must be an integer, got NaN"),
    (line(point_radius="\x9b2J"), r'got "\x9b2J"'),
    (line(token_labels=[1, 0, 1]), "3 token_labels but 4 prompt tokens"),
    (line(token_labels=[1, 0, 1, 2]), "token_labels must be 0 (misaligned) or 1 (aligned), got 2"),
    (line(token_labels=[1, 0, 1, "1"]), 'got "1"'),
    (rating_of("overall", 0), "ratings.overall must be 1 to 5, got 0"),
    (rating_of("plausibility", 6), "ratings.plausibility must be 1 to 5, got 6"),
    (rating_of("alignment", 2.5), "ratings.alignment must be an integer, got 2.5"),
    (rating_of("alignment", True), "ratings.alignment must be an integer, got true"),
    (line(ratings={"overall": 3}), "ratings.plausibility is missing"),
    (line(ratings=[3, 3, 3, 3]), "ratings must be an object"),
    (line(image_size={"width": 50}), "image_size.height is missing"),
    (line(image_size={"width": 50, "height": 0}), "image_size.height must be 1 to 8192, got 0"),
    (line(prompt=", ."), "has no tokens"),
    (line(prompt=None), "prompt must be a string, got null"),
    (line(prompt=["\x9b31m\u2028"]), r'prompt must be a string, got ["\x9b31m\u2028"]'),
    (line(image_id="\ud800"), "image_id can't be written as UTF-8"),
    (without("tool_version"), "tool_version is missing"),
    (line(point_radius="width/20"), 'point_radius must be "height/N"'),
    (line(point_radius="height/0"), 'point_radius must be "height/N"'),
    ([LINE], "a line must be a JSON object"),
    ('{"image_id": "train/1.png", \n', "no JSON: Expecting"),
    ("[" * 100_000 + "\n", "no JSON: lists or objects are nested more than 200 deep"),
    (line(rater_id="first"), "rater 'first' has already rated image 'train/1.png' in line 1"),
    (line(prompt="A red dog, asleep"), "prompt of image 'train/1.png' differs from line 1"),
    (line(image_size={"width": 50, "height": 80}), "height of image 'train/1.png' differs from line 1"),
]


def test_every_bad_line_is_named_counted_and_left_out(tmp_path):
    raw = [line(rater_id="first"), *(bad for bad, _ in BAD_LINES), line(rater_id="last"), "\n"]
    out = tmp_path / "out.tfrecord"
    result = run(write_raw(tmp_path / "raw.jsonl", raw), out, "--on-error=skip")
    assert result.returncode == 0, result.stderr
    assert f"1 images (1 with 2 raters) from 2 lines, {len(BAD_LINES)} skipped" in result.stdout
    skipped = [text for text in result.stderr.splitlines() if text.startswith("skipped")]
    assert len(skipped) == len(BAD_LINES)
    for number, (text, (_, reason)) in enumerate(zip(skipped, BAD_LINES, strict=True), start=2):
        assert text.startswith(f"skipped {tmp_path}/raw.jsonl:{number}: ")
        assert reason in text


def test_a_bad_line_stops_and_nothing_is_written(tmp_path):
    raw = write_raw(tmp_path / "raw.jsonl", [LINE, rating_of("overall", 6), without("rater_id")])
    result = run(raw, tmp_path / "out.tfrecord")
    assert result.returncode == 1
    assert result.stderr.startswith(f"{raw}:2: ratings.overall must be 1 to 5, got 6\n")
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == [raw]


def test_help_documents_the_schema():
    result = run("--help")
    assert result.returncode == 0
    for field in LINE:
        assert field in result.stdout


def test_tfrecord_opens_as_plain_examples(tmp_path):
    import tensorflow as tf

    out = tmp_path / "out.tfrecord"
    out.write_text("an older file")
    raw = write_raw(tmp_path / "raw.jsonl", [LINE, line(image_id="train/2.png")])
    summary = consolidate.consolidate_file(raw, out)
    assert (summary.images, summary.lines, summary.skipped) == ({1: 2}, 2, [])
    first, second = (tf.train.Example.FromString(r.numpy()) for r in tf.data.TFRecordDataset(str(out)))
    features = dict(first.features.feature)
    assert set(features) == {
        *("filename", "artifact_score", "misalignment_score", "aesthetics_score", "overall_score"),
        *("artifact_map", "misalignment_map", "prompt_misalignment_label"),
    }
    assert features["filename"].bytes_list.value == [b"train/1.png"]
    assert features["overall_score"].float_list.value == [1.0]
    assert features["misalignment_score"].float_list.value == [0.25]
    assert features["prompt_misalignment_label"].bytes_list.value == [b"1 0 1 1"]
    heatmap = tf.io.decode_png(features["artifact_map"].bytes_list.value[0]).numpy()[..., 0]
    np.testing.assert_array_equal(
        heatmap, 255 * consolidate.point_heatmap([(10, 12.5)], height=40, width=50, radius=2)
    )
    assert second.features.feature["filename"].bytes_list.value == [b"train/2.png"]


def test_failure_while_writing_leaves_the_old_file(tmp_path):
    out = tmp_path / "out.tfrecord"
    out.write_text("an older file")

    def records():
        yield consolidate.consolidate([ratings.parse_rating(json.dumps(LINE))])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consolidate.write_tfrecord(records(), out)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["an older file"]


@pytest.mark.parametrize(
    ("raw_lines", "out", "reason"),
    [
        (None, "out.tfrecord", "raw.jsonl: No such file"),
        ([], "out.tfrecord", "raw.jsonl: no good line"),
        (["{}\n"], "out.tfrecord", "raw.jsonl:1: image_size is missing"),
        ([LINE], "missing/out.tfrecord", "missing: no such folder"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, raw_lines, out, reason):
    raw = tmp_path / "raw.jsonl"
    if raw_lines is not None:
        write_raw(raw, raw_lines)
    with pytest.raises(errors.UserError, match=reason):
        consolidate.consolidate_file(raw, tmp_path / out, on_error="skip")
    assert not (tmp_path / out).exists()


def test_raw_ratings_are_never_overwritten(tmp_path):
    raw = tmp_path / "raw.jsonl"
    raw.write_text("the only copy")
    (tmp_path / "link").symlink_to(raw)
    for out in (raw, tmp_path / "link"):
        with pytest.raises(errors.UserError, match="is the file of raw ratings.*name another OUT"):
            consolidate.consolidate_file(raw, out)
    assert raw.read_text() == "the only copy"
