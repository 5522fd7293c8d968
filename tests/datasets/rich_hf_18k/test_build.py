"""Tests the whole command: from each source to TFDS, and its messages on bad images and labels."""

import dataclasses
import json
import math
import shutil
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from richhf_jax import feedback
from richhf_jax.datasets import consolidate, sample_sources
from richhf_jax.inputs import images

OVERALL = feedback.SCORE_FIELDS[feedback.OVERALL]
AESTHETICS = feedback.SCORE_FIELDS[feedback.AESTHETICS]
MAPS = tuple(feedback.HEATMAP_FIELDS.values())
TFDS_SPLITS = {"train": "train", "dev": "validation", "test": "test"}


def assert_built_from(examples: dict[str, dict], samples: list[sample_sources.Sample]) -> None:
    """Asserts that the data set has exactly these samples, with all their fields."""
    assert examples.keys() == {sample.record[feedback.FILENAME_FIELD] for sample in samples}
    for sample in samples:
        example = examples[sample.record[feedback.FILENAME_FIELD]]
        assert example["split"] == TFDS_SPLITS[sample.split]
        assert example[feedback.IMAGE_FIELD] == images.checked(sample.image)
        assert example[feedback.PROMPT_FIELD].decode() == sample.prompt
        assert example[feedback.KEYWORDS_FIELD].decode() == sample.record[feedback.KEYWORDS_FIELD]
        for field in MAPS:
            assert example[field] == sample.record[field]
        for field in feedback.SCORE_FIELDS.values():
            np.testing.assert_array_equal(example[field], np.float32(sample.record[field]))


def with_record(samples, index, **changes):
    """Returns the samples with a changed record at `index`; a value of None removes the field."""
    record = {field: v for field, v in {**samples[index].record, **changes}.items() if v is not None}
    return [*samples[:index], dataclasses.replace(samples[index], record=record), *samples[index + 1 :]]


def png(width: int, height: int) -> bytes:
    """Returns a PNG that lacks all but its first few pixels."""
    header = b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [header, (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


@pytest.mark.parametrize("source", ["pick_a_pic", "joined", "joined alone", "csv", "jsonl"])
def test_built_data_equals_labels_and_images(bench, samples, source):
    bench.write(samples)
    sample_sources.write_joined(bench.root / "joined", samples)
    sample_sources.write_images(bench.root, samples)
    options = {
        "pick_a_pic": [],
        "joined": [f"--joined={bench.root}/joined"],
        "joined alone": [f"--joined={bench.root}/joined"],
        "csv": [f"--images={bench.root}/images", f"--prompts={bench.root}/prompts.csv"],
        "jsonl": [f"--images={bench.root}/images", f"--prompts={bench.root}/prompts.jsonl"],
    }[source]
    assert bench.run(*options, labels=source != "joined alone") is None
    assert_built_from(bench.examples(), samples)
    assert bench.report["splits"]["dev"] == {"records": 2, "with_image": 2, "published": 995}
    assert not any(bench.report[name] for name in ("missing", "undecodable", "mismatches", "problem"))


def test_features_are_those_of_the_synthetic_data(bench):
    from richhf_jax.datasets import synthetic_rich_hf
    from richhf_jax.datasets.rich_hf_18k import builder

    features = builder.RichHf18k(data_dir=bench.data_dir).info.features
    synthetic = synthetic_rich_hf.SyntheticRichHf(data_dir=bench.data_dir).info.features
    assert {name: (type(f), f.dtype) for name, f in features.items()} == {
        name: (type(f), f.dtype) for name, f in synthetic.items()
    }
    assert features[feedback.IMAGE_FIELD].shape == (None, None, 3)


def test_what_is_built_is_not_built_again(bench, samples, shards_read):
    bench.write(samples)
    assert bench.run() is None
    assert shards_read
    shards_read.clear()
    assert bench.run() is None
    assert "already" in bench.output
    assert shards_read == []


def test_half_the_images_missing(bench, samples, shards_read):
    bench.write(samples)
    shutil.rmtree(bench.shards)
    sample_sources.write_pick_a_pic(bench.shards, samples[::2])
    message = bench.run()
    assert message.startswith("6 records have no image or a broken one, and --allow-missing=0")
    assert not bench.built
    assert "missing images: 6" in bench.output
    assert bench.report["missing"] == [sample.record[feedback.FILENAME_FIELD] for sample in samples[1::2]]
    assert bench.run("--allow-missing=5")
    assert not bench.built
    shards_read.clear()
    assert bench.run("--allow-missing=6") is None
    assert shards_read == []
    assert_built_from(bench.examples(), samples[::2])
    assert bench.report["problem"] is None


def test_broken_images_are_listed_with_file_and_row(bench, samples):
    broken = (
        samples[0].image[:-200],
        png(10_000, 10_000),
        png(64, 64)[:-20] + b"?" + png(64, 64)[-19:],
        b"<html>Not Found</html>",
        b"",
    )
    sample_sources.write_labels(bench.labels, samples)
    changed = [dataclasses.replace(s, image=image) for s, image in zip(samples, broken, strict=False)]
    sample_sources.write_joined(bench.root / "joined", changed + samples[5:])
    message = bench.run(f"--joined={bench.root}/joined", "--allow-missing=4")
    assert message.startswith("5 records")
    reasons = ("broken JPEG", "10000 x 10000 pixels; at most 8192", "checksum", "HTML page", "no bytes")
    shard = f"{bench.root}/joined/train-00000-of-00001.parquet"
    for row, reason in enumerate(reasons):
        (line,) = (line for line in bench.report["undecodable"] if samples[row].uid in line)
        assert f"{shard}: row {row}, {feedback.IMAGE_FIELD}: " in line
        assert reason in line
    assert bench.report["missing"] == []
    assert bench.run(f"--joined={bench.root}/joined", "--allow-missing=5") is None
    assert_built_from(bench.examples(), samples[5:])


def test_another_row_gives_a_good_image(bench, samples):
    bench.write(samples)
    rows = [row for path in sorted(bench.shards.glob("train*")) for row in pq.read_table(path).to_pylist()]
    uid = samples[0].uid  # It is in two rows.
    sides = [(row, side) for row in rows for side in (0, 1) if row[f"image_{side}_uid"] == uid]
    assert len(sides) == 2
    row, side = sides[0]
    row[f"jpg_{side}"] = row[f"jpg_{side}"][:-100]
    for path in bench.shards.glob("train*"):
        path.unlink()
    table = pa.Table.from_pylist(rows, sample_sources.PICK_A_PIC_SCHEMA)
    pq.write_table(table, bench.shards / "train-00000-of-00001-0123456789abcdef.parquet", row_group_size=4)
    assert bench.run() is None
    assert_built_from(bench.examples(), samples)
    (replaced_line,) = bench.report["replaced"]
    assert f"jpg_{side}: broken JPEG" in replaced_line


def test_first_prompt_counts_and_others_are_listed(bench, samples):
    bench.write(samples)
    sample = samples[0]
    seen = 0
    for path in sorted(bench.shards.glob("train*")):
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            if sample.uid in (row["image_0_uid"], row["image_1_uid"]):
                seen += 1
                row["caption"] = f"prompt {seen}"
        pq.write_table(pa.Table.from_pylist(rows, sample_sources.PICK_A_PIC_SCHEMA), path, row_group_size=100)
    assert seen == 2
    assert bench.run() is None
    assert bench.examples()[sample.record[feedback.FILENAME_FIELD]][feedback.PROMPT_FIELD] == b"prompt 1"
    (line,) = bench.report["other_prompts"]
    assert sample.uid in line
    assert "'prompt 2'" in line


def test_labels_that_do_not_fit_the_prompt_are_kept_and_listed(bench, samples):
    changed = with_record(samples, 0, **{feedback.KEYWORDS_FIELD: "1 0"})
    changed = with_record(changed, 1, **{feedback.KEYWORDS_FIELD: None})
    bench.write(changed)
    assert bench.run() is None
    examples = bench.examples()
    assert len(examples) == 12
    assert examples[samples[0].record[feedback.FILENAME_FIELD]][feedback.KEYWORDS_FIELD] == b"1 0"
    first, second = bench.report["mismatches"]
    assert samples[0].uid in first
    assert "but there are 2 labels" in first
    assert "but there are 0 labels" in second


def test_zero_and_missing_scores(bench, samples):
    changed = with_record(samples, 0, **{OVERALL: 0.0})
    changed = with_record(changed, 1, **{AESTHETICS: None})
    bench.write(changed)
    assert bench.run() is None
    examples = bench.examples()
    names = [sample.record[feedback.FILENAME_FIELD] for sample in samples]
    assert examples[names[0]][OVERALL] == 0
    assert math.isnan(examples[names[1]][AESTHETICS])
    report = bench.report
    assert (report["zero_overall"], report["zero_overall_treated_as"]) == ([names[0]], "score")
    assert report["missing_scores"] == {AESTHETICS: 1}


def test_a_zero_of_the_mirror_is_missing_unless_the_labels_say_otherwise(bench, samples):
    sample_sources.write_labels(bench.labels, samples)
    sample_sources.write_joined(bench.root / "joined", with_record(samples, 0, **{OVERALL: 0.0}))
    joined = f"--joined={bench.root}/joined"
    name = samples[0].record[feedback.FILENAME_FIELD]
    assert bench.run(joined, labels=False) is None
    assert math.isnan(bench.examples()[name][OVERALL])
    assert (bench.report["zero_overall"], bench.report["zero_overall_treated_as"]) == ([name], "missing")
    shutil.rmtree(bench.data_dir)
    assert bench.run(joined) is None
    assert bench.examples()[name][OVERALL] == np.float32(samples[0].record[OVERALL])


def test_duplicates_in_the_labels_are_listed_and_the_first_counts(bench, samples):
    bench.write(samples)
    train = [sample.record for sample in samples if sample.split == "train"]
    again = {**train[0], OVERALL: 0.125}
    consolidate.write_tfrecord([*train, again], bench.labels / "train.tfrecord")
    assert bench.run() is None
    assert_built_from(bench.examples(), samples)
    (line,) = bench.report["duplicates"]
    assert line.startswith(f"{bench.labels}/train.tfrecord: record 8: {train[0][feedback.FILENAME_FIELD]}")


def test_a_broken_heatmap_leaves_its_record_out(bench, samples):
    bench.write(with_record(samples, 3, **{MAPS[0]: b"\x89PNG\r\n"}))
    assert bench.run().startswith("1 records have no image or a broken one")
    (line,) = bench.report["undecodable"]
    assert f"{bench.labels}/train.tfrecord: record 3: heatmap: " in line
    assert bench.run("--allow-missing=1") is None
    assert_built_from(bench.examples(), samples[:3] + samples[4:])


def test_report_is_printed_in_short_and_written_in_full(bench, samples):
    bench.write(samples)
    shutil.rmtree(bench.shards)
    sample_sources.write_pick_a_pic(bench.shards, samples[7:])
    bench.run()
    assert bench.output.count(".png") == 5
    assert "    ..." in bench.output
    assert len(json.loads((bench.work_dir / "report.json").read_text())["missing"]) == 7


@pytest.mark.parametrize(
    ("options", "labels"), [(["--images=x"], True), (["--joined=x", "--pick_a_pic=y"], True), ([], False)]
)
def test_sources_that_make_no_sense(bench, options, labels):
    assert "see --help" in bench.run(*options, labels=labels)


def test_tfds_alone_says_how_to_build(bench, samples):
    import tensorflow_datasets as tfds

    from richhf_jax import errors
    from richhf_jax.datasets.rich_hf_18k import builder

    def build():
        config = tfds.download.DownloadConfig(manual_dir=bench.work_dir, try_download_gcs=False)
        builder.RichHf18k(data_dir=bench.data_dir).download_and_prepare(download_config=config)

    with pytest.raises(AssertionError, match="python -m richhf_jax.datasets.rich_hf_18k"):
        build()
    bench.write(samples)
    shutil.rmtree(bench.shards)
    sample_sources.write_pick_a_pic(bench.shards, samples[:6])
    assert bench.run()
    with pytest.raises(errors.UserError, match="6 records have no image"):
        build()
