"""Tests descriptions: worked examples, figures recomputed from the sources, messages on broken sources."""

import collections
import io
import json
import math
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from richhf_jax import errors, feedback
from richhf_jax.datasets import consolidate, sample_sources
from richhf_jax.datasets.describe import __main__ as describe
from richhf_jax.datasets.describe import figure, page, sources, statistics, text
from richhf_jax.datasets.describe.statistics import Record, Statistics

VOCABULARY = str(pathlib.Path(__file__).parents[2] / "tasks/sentencepiece_small.model")


@pytest.fixture(scope="module")
def samples():
    return sample_sources.make_samples(24)


@pytest.fixture(scope="module")
def folder(samples, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("sources")
    sample_sources.write_raw(folder / "raw", samples)
    sample_sources.write_labels(folder / "labels", samples)
    return folder


def summarise(*records: Record, **arguments) -> dict:
    statistic = Statistics(**arguments)
    for record in records:
        statistic.add(record)
    return statistic.summary()


def scored(name: str, score: float) -> Record:
    return Record(name, scores=dict.fromkeys(feedback.SCORES, score))


def test_scores_by_hand():
    values = [0, 1, 1 / 12, np.float32(1 / 12), 0.5, math.nan, 1.5]
    part = summarise(*(scored(f"image {i}", v) for i, v in enumerate(values)))["scores"]["alignment"]
    assert part["histogram"] == [1, 2, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1]
    assert part["count"] == 5
    assert part["mean"] == pytest.approx((0 + 1 + 2 / 12 + 0.5) / 5)
    assert part["sd"] == pytest.approx(np.std([0, 1, 1 / 12, 1 / 12, 0.5]))
    assert part["missing"] == {"count": 1, "first": ["image 5"]}
    assert part["out_of_range"] == {"count": 1, "first": ["image 6"]}


def test_a_score_that_every_record_lacks():
    part = summarise(scored("a", math.nan))["scores"]["overall"]
    assert (part["count"], part["mean"], part["sd"]) == (0, None, None)
    assert "-" in text.format_summary("title", summarise(scored("a", math.nan)))


def heatmap_record(name: str, heatmap: np.ndarray) -> Record:
    return Record(name, heatmaps={feedback.MISALIGNMENT: consolidate.encode_png(heatmap)})


def test_heatmaps_by_hand():
    half = np.zeros((128, 64), np.uint8)
    half[:64] = 255
    faint = np.full((64, 256), 85, np.uint8)
    records = [heatmap_record("a", half), heatmap_record("b", faint), heatmap_record("c", half * 0)]
    part = summarise(*records, Record("d", heatmaps={feedback.MISALIGNMENT: b"none"}))["heatmaps"][
        "misalignment"
    ]
    assert (part["count"], part["empty"]) == (3, 1)
    assert part["empty_share"] == pytest.approx(1 / 3)
    assert part["marked_share"] == pytest.approx((0.5 + 1) / 2)
    mean = np.array(part["mean"])
    assert mean.shape == (64, 64)
    # Rounded to five digits.
    np.testing.assert_allclose(mean[:32], (1 + 1 / 3) / 3, atol=1e-5)
    np.testing.assert_allclose(mean[32:], (1 / 3) / 3, atol=1e-5)
    assert part["unreadable"]["count"] == 1
    assert part["unreadable"]["first"][0].startswith("d: neither JPEG, PNG")


def test_labels_by_hand():
    labelled = [
        ("a red cat", "1 0 1"),
        ("a cat", "1 1"),
        ("a dog", "0 0"),
        ("a, dog", "1 1 1"),  # Three labels for two tokens.
        ("a dog", "1 2"),
        (None, "0 1 1"),  # Without a prompt, there is nothing to compare with.
    ]
    part = summarise(*(Record(f"{i}", prompt=p, labels=text) for i, (p, text) in enumerate(labelled)))[
        "labels"
    ]
    assert (part["records"], part["records_with_misaligned"], part["tokens"], part["misaligned_tokens"]) == (
        *(4, 3),
        *(10, 4),
    )
    assert part["misaligned_token_share"] == 0.4
    assert part["records_with_misaligned_share"] == 0.75
    assert part["mismatches"]["count"] == 2
    assert part["mismatches"]["first"][0] == "3: 2 tokens but 3 labels"
    assert part["mismatches"]["first"][1].startswith(
        "4: labels must be 0 (misaligned) or 1 (aligned), got '2'"
    )


def test_prompt_lengths_by_hand():
    prompts = ["a", "b c", "d, e", *["f g h"] * 16, "i j k l"]
    lengths = summarise(*(Record(p, prompt=p) for p in prompts), count_tokens=len, limit=5)["prompt_lengths"]
    assert lengths["words"]["histogram"] == [[1, 1], [2, 2], [3, 16], [4, 1]]
    assert [lengths["words"][key] for key in ("median", "p95", "max", "count")] == [3, 3, 4, 20]
    assert lengths["words"]["mean"] == (1 + 4 + 48 + 4) / 20
    assert (lengths["tokens"]["limit"], lengths["tokens"]["over_limit"]) == (5, 1)


def test_images_by_header(monkeypatch):
    def encoded(width, height, extension):
        return sample_sources.encode(np.zeros((height, width, 3), np.uint8), extension)

    images = [
        encoded(4, 3, "png"),
        encoded(4, 3, "jpg"),
        encoded(5, 5, "png"),
        encoded(6, 6, "png"),
        b"",
        b"<html>",
    ]
    # A file that is cut off still has its header; TFDS data was checked when it was built.
    images[1] = images[1][:-2]
    monkeypatch.setattr(statistics, "MAX_SIZES", 2)
    part = summarise(*(Record(f"{i}", image=data) for i, data in enumerate(images)))["images"]
    assert part["formats"] == {"PNG": 3, "JPEG": 1}
    assert part["sizes"] == [[4, 3, 2], [5, 5, 1], [None, None, 1]]
    assert [name[:2] for name in part["unreadable"]["first"]] == ["4:", "5:"]


def test_only_the_first_problems_are_listed():
    part = summarise(*(scored(f"{i}", math.nan) for i in range(150)))["scores"]["overall"]["missing"]
    assert part["count"] == 150
    assert part["first"] == [f"{i}" for i in range(100)]


def test_what_a_source_lacks_is_left_out():
    summary = summarise(Record("a", prompt="a cat"))
    assert set(summary) == {"records", "prompt_lengths"}
    assert "Scores" not in text.format_summary("captions", summary)
    assert "Scores" not in page.make_page("captions", summary)
    assert Image.open(io.BytesIO(figure.make_png("captions", summary))).height < 500


def test_agreement_and_consolidated_figures_of_raw_ratings(folder):
    path = folder / "raw/train.jsonl"
    answers = collections.defaultdict(list)
    for line in path.read_text().splitlines():
        rating = json.loads(line)
        answers[rating["image_id"]].append(rating)
    summary = summarise(*sources.raw_records(path))
    assert summary["raters"] == {"3": 16}
    for kind in feedback.SCORES:
        ratings = np.array([[a["ratings"][kind] for a in group] for group in answers.values()])
        spread = (ratings.max(1) - ratings.min(1)) / 4
        part = summary["agreement"][kind]
        assert part["histogram"] == [np.sum(spread == step / 4) for step in range(5)]
        assert part["perfect_share"] == np.mean(spread == 0)
        assert part["good_share"] == np.mean(spread <= 0.25)
        assert summary["scores"][kind]["mean"] == pytest.approx(np.mean((ratings - 1) / 4))
    points = [[a["misalignment_points"] for a in group] for group in answers.values()]
    assert summary["heatmaps"]["misalignment"]["empty"] == sum(not any(group) for group in points)
    votes = [np.mean([a["token_labels"] for a in group], axis=0) for group in answers.values()]
    assert summary["labels"]["misaligned_tokens"] == np.sum(np.concatenate(votes) < 0.5)
    assert summary["labels"]["mismatches"]["count"] == 0


def test_labels_and_raw_ratings_have_the_same_figures(folder):
    raw, labels = (
        summarise(*records)
        for records in (
            sources.raw_records(folder / "raw/dev.jsonl"),
            sources.label_records([folder / "labels/dev.tfrecord"]),
        )
    )
    of_raters = {"raters", "agreement", "word_agreement", "point_agreement", "rater_scores"}
    assert set(raw) - set(labels) == {*of_raters, "prompt_lengths"}
    assert labels["heatmaps"] == raw["heatmaps"]
    assert labels["labels"] == raw["labels"]
    for kind in feedback.SCORES:
        assert labels["scores"][kind]["histogram"] == raw["scores"][kind]["histogram"]


def test_built_data_against_numpy(synthetic_data_dir):
    builder = tfds.builder("synthetic_rich_hf", data_dir=synthetic_data_dir, try_gcs=False)
    examples = list(tfds.as_numpy(builder.as_dataset(split="train")))
    summary = summarise(*sources.tfds_records("synthetic_rich_hf", str(synthetic_data_dir), "train"))
    assert summary["records"] == len(examples) == 32
    assert summary["images"]["sizes"] == [[64, 64, 32]]
    for kind, field in feedback.SCORE_FIELDS.items():
        values = np.array([example[field] for example in examples], np.float64)
        assert summary["scores"][kind]["mean"] == pytest.approx(values.mean())
        assert summary["scores"][kind]["sd"] == pytest.approx(values.std())
    for kind, field in feedback.HEATMAP_FIELDS.items():
        maps = np.stack([example[field][..., 0] for example in examples]) / 255
        part = summary["heatmaps"][kind]
        assert part["empty"] == np.sum(maps.max((1, 2)) == 0)
        assert part["marked_share"] == pytest.approx(np.mean((maps > 0).mean((1, 2))[maps.max((1, 2)) > 0]))
        np.testing.assert_allclose(part["mean"], maps.mean(0), atol=1e-5)  # rounded to five digits
    labels = np.concatenate([example["prompt_misalignment_label"].split() for example in examples])
    assert summary["labels"]["misaligned_token_share"] == np.mean(labels == b"0")


def test_captions_have_prompts_and_images_alone(synthetic_data_dir):
    summary = summarise(*sources.tfds_records("synthetic_captions", str(synthetic_data_dir), "validation"))
    assert set(summary) == {"records", "prompt_lengths", "images"}


@pytest.mark.parametrize(
    ("dataset", "split", "message"),
    [
        ("no_such_set", "train", r"^.*: there is no data set no_such_set, see --data_dir$"),
        (
            "synthetic_rich_hf/no_such_config",
            "train",
            "there is no data set synthetic_rich_hf/no_such_config",
        ),
        (
            "synthetic_rich_hf",
            "dev",
            r"synthetic_rich_hf: Unknown split 'dev'.*\['train', 'validation', 'test'\]",
        ),
    ],
)
def test_a_data_set_that_is_not_there(synthetic_data_dir, dataset, split, message):
    with pytest.raises(errors.UserError, match=message):
        list(sources.tfds_records(dataset, str(synthetic_data_dir), split))


def test_a_broken_file_of_a_built_data_set(synthetic_data_dir, tmp_path):
    shutil.copytree(synthetic_data_dir / "synthetic_captions", tmp_path / "synthetic_captions")
    (path,) = tmp_path.rglob("*-validation.tfrecord-*")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(errors.UserError, match=f"^{path.parent}: .*; build synthetic_captions again$"):
        list(sources.tfds_records("synthetic_captions", str(tmp_path), "validation"))


def example(**fields) -> bytes:
    features = {
        name: tf.train.Feature(
            float_list=tf.train.FloatList(value=[value]) if isinstance(value, float) else None,
            bytes_list=tf.train.BytesList(value=[value]) if isinstance(value, bytes) else None,
        )
        for name, value in fields.items()
    }
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def test_a_record_without_a_score(tmp_path):
    path = tmp_path / "x.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as writer:
        writer.write(example(filename=b"a.png", overall_score=0.5, prompt_misalignment_label=b"1"))
        writer.write(example(overall_score=0.25))
    summary = summarise(*sources.label_records([path]))
    assert summary["scores"]["overall"]["mean"] == 0.375
    assert summary["scores"]["alignment"]["missing"] == {"count": 2, "first": ["a.png", f"{path}: record 1"]}
    assert summary["labels"]["records"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-7], ": record 3 is cut off or corrupt"),
        (lambda data: data[:60] + b"?" + data[61:], ": record 0: garbled: its checksum is wrong"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid", " is a pointer of Git LFS"),
    ],
)
def test_a_broken_label_file_is_named_with_its_record(folder, tmp_path, change, message):
    path = tmp_path / "dev.tfrecord"
    path.write_bytes(change((folder / "labels/dev.tfrecord").read_bytes()))
    with pytest.raises(errors.UserError, match=f"^{re.escape(str(path) + message)}"):
        list(sources.label_records([path]))


def test_a_record_that_is_no_example(tmp_path):
    path = tmp_path / "x.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as writer:
        writer.write(b"\xff\xff\xff")
    with pytest.raises(errors.UserError, match=r"x\.tfrecord: record 0: it is no tf\.train\.Example"):
        list(sources.label_records([path]))


def test_a_bad_line_of_raw_ratings(folder, tmp_path):
    path = tmp_path / "raw.jsonl"
    path.write_text((folder / "raw/dev.jsonl").read_text() + "{}\n")
    with pytest.raises(errors.UserError, match=rf"^{path}:13: image_size is missing$"):
        list(sources.raw_records(path))


def test_command_line_writes_all_outputs(folder, tmp_path, capsys):
    outputs = {name: tmp_path / f"out.{name}" for name in ("json", "png", "html")}
    describe.main(
        [
            f"--raw={folder / 'raw/train.jsonl'}",
            *(f"--vocabulary={VOCABULARY}", "--length=10"),
            *(f"--{name}={path}" for name, path in outputs.items()),
        ]
    )
    printed = capsys.readouterr().out
    content = json.loads(outputs["json"].read_text())
    over = content["prompt_lengths"]["tokens"]["over_limit"]
    assert f"{over} over 10" in printed
    assert 0 < over < content["records"] == 16
    with Image.open(outputs["png"]) as picture:
        assert picture.width == 1210
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 100
    html = outputs["html"].read_text()
    assert html.count("data:image/png;base64,") == 3  # two heatmaps and their scale
    assert not re.search(r"https?://|<script|<link", html)
    for kind in (*feedback.SCORES, *feedback.HEATMAPS):
        assert f"<h3>{kind}</h3>" in html
    agreement = content["agreement"]["plausibility"]["perfect_share"]
    assert f"{agreement:.1%}".replace("%", " %") in html
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "out.json", "out.png"]


def test_corrupted_captions_are_printed(synthetic_data_dir, capsys):
    arguments = ["--dataset=synthetic_captions", f"--data_dir={synthetic_data_dir}", "--corrupted=5"]
    describe.main(arguments)
    printed = capsys.readouterr().out
    head, *lines = printed.splitlines()
    assert head == "synthetic_captions, train: 5 corrupted captions, wrong words in brackets"
    records = sources.tfds_records("synthetic_captions", str(synthetic_data_dir), "train")
    captions = {record.prompt for record in records}
    for number, (true, wrong) in enumerate(zip(lines[::2], lines[1::2], strict=True), start=1):
        assert true[:5] == f"{number:4} "
        assert true[5:] in captions
        tokens, marked = feedback.tokenize_prompt(true[5:]), wrong.split()
        plain = [word.strip("[]") for word in marked]
        assert len(tokens) == len(marked)
        assert plain != tokens
        assert any(word.startswith("[") for word in marked)
    describe.main(arguments)
    assert capsys.readouterr().out == printed


def test_captions_of_coco_are_the_first_of_each_image(monkeypatch):
    examples = [{"captions": {"text": [b"a cat", b"a black cat"]}}, {"captions": {"text": [b"two dogs"]}}]
    monkeypatch.setattr(sources, "_tfds_examples", lambda *_: iter(examples))
    assert list(sources.tfds_captions("coco_captions", None, "train")) == ["a cat", "two dogs"]


def test_captions_without_a_known_word(synthetic_data_dir, monkeypatch):
    monkeypatch.setattr(sources, "tfds_captions", lambda *_: iter(["nothing", "here"]))
    with pytest.raises(SystemExit) as exit_info:
        describe.main(["--dataset=web_captions", "--corrupted=5"])
    assert "web_captions, train: no caption has a word of the table" in str(exit_info.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--raw=a.jsonl", "--corrupted=5"], "--corrupted needs --dataset"),
        (["--dataset=a", "--corrupted=0"], "a number above 0"),
        (["--dataset=a", "--words=english"], "--words needs --corrupted"),
        (["--dataset=a", "--corrupted=5", "--json=a.json"], "--corrupted only prints"),
    ],
)
def test_flags_of_corrupted_captions(arguments, message, capsys):
    with pytest.raises(SystemExit):
        describe.main(arguments)
    assert message in capsys.readouterr().err


def test_tokens_are_the_models_with_the_end(folder):
    import seqio

    vocabulary = seqio.SentencePieceVocabulary(VOCABULARY, extra_ids=0)
    prompt = "a drawing of two large red circles"
    assert describe.token_counter(VOCABULARY)(prompt) == len(vocabulary.encode(prompt)) + 1


def test_text_is_aligned():
    table = text.format_summary("title", summarise(scored("a", 0.5), scored("b", math.nan)))
    lines = table.splitlines()
    start = lines.index("Scores: records by score, to the nearest 1/12")
    rows = lines[start + 1 : start + 18]
    assert len({len(row) for row in rows}) == 1
    assert rows[1].split() == ["mean", "0.500", "0.500", "0.500", "0.500"]
    assert rows[9].split() == ["0.50", "1", "1", "1", "1"]
    assert "1 missing overall scores\n  b" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--raw=no_such.jsonl"], "no_such.jsonl: No such file or directory"),
        (["--labels", "no_such.tfrecord"], "no_such.tfrecord: No such file or directory"),
        (["--raw=empty.jsonl"], "there are no records"),
        (
            ["--raw=empty.jsonl", "--vocabulary=empty.jsonl"],
            "--vocabulary: empty.jsonl: no SentencePiece model",
        ),
        (["--raw=empty.jsonl", "--vocabulary=zero"], "--vocabulary: zero: no SentencePiece model"),
        (["--dataset=", "--data_dir=none"], "none: there is no data set"),
        # Known before anything is read.
        (
            ["--raw=empty.jsonl", "--json=no/such/folder.json"],
            "no/such/folder.json: No such file or directory",
        ),
        (["--raw=empty.jsonl", "--html=no/x.html"], "no/x.html: No such file or directory"),
        (["--raw=empty.jsonl", "--png=."], ".: Is a directory"),
    ],
)
def test_mistakes_end_with_a_message(folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("empty.jsonl").write_text("\n", encoding="utf-8")
    pathlib.Path("zero").touch()
    pathlib.Path("raw.jsonl").write_bytes((folder / "raw/dev.jsonl").read_bytes())
    with pytest.raises(SystemExit) as exit_info:
        describe.main(arguments)
    assert message in str(exit_info.value)


def test_hostile_text_is_shown_not_run():
    hostile = "</li><script>alert(1)</script>\"'>\x1b[31m\n# b $\\foo$"
    summary = summarise(scored(hostile, math.nan))
    html = page.make_page(hostile, summary)
    assert "<script" not in html
    assert html.count("&lt;script&gt;") == 6  # In the title, the heading and four lists of problems.
    printed = text.format_summary("title", summary)
    assert printed.count(r"\x1b[31m\n# b") == 4
    assert Image.open(io.BytesIO(figure.make_png("a $\\foo$", summary))).width


def test_matplotlib_and_jax_stay_out(folder):
    code = (
        "import sys\n"
        "from richhf_jax.datasets.describe import __main__\n"
        f"__main__.main(['--raw={folder / 'raw/dev.jsonl'}'])\n"
        "assert not {'matplotlib', 'jax', 'tensorflow'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
