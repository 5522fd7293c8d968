"""Tests the sample sources: true schemas, the same content in all forms, the same bytes each time."""

import collections
import csv
import io
import json
import pathlib
import re
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from PIL import Image

from richhf_jax import errors, feedback
from richhf_jax.datasets import consolidate, sample_sources

COUNTS = {"train": 16, "dev": 4, "test": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("sources") / "out"
    sample_sources.write(out)
    return out


def read_labels(path: pathlib.Path) -> list[dict]:
    """Reads a TFRecord's examples as plain Python, with protobuf only."""
    records = []
    for data in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
        features = tf.train.Example.FromString(data).features.feature
        records.append({n: (*f.bytes_list.value, *f.float_list.value)[0] for n, f in features.items()})
    return records


def uid(filename: bytes | str) -> str:
    return pathlib.PurePath(filename.decode() if isinstance(filename, bytes) else filename).stem


@pytest.fixture(scope="module")
def prompts(folder) -> dict[str, str]:
    with (folder / "prompts.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()] == rows
    return {row["uid"]: row["prompt"] for row in rows}


@pytest.mark.parametrize("split", COUNTS)
def test_labels_are_the_consolidated_raw_ratings(folder, split, prompts):
    lines = (folder / "raw" / f"{split}.jsonl").read_text().splitlines()
    assert len(lines) == 3 * COUNTS[split]
    expected = {record["filename"]: record for record in consolidate.consolidate_lines(lines)}
    records = read_labels(folder / "labels" / f"{split}.tfrecord")
    assert len(records) == COUNTS[split]
    for record in records:
        raw = expected[record["filename"].decode()]
        assert set(record) == set(raw)
        assert record["artifact_score"] == np.float32(raw["artifact_score"])
        assert record["misalignment_map"] == raw["misalignment_map"]
        labels = record["prompt_misalignment_label"].decode()
        assert labels == raw["prompt_misalignment_label"]
        assert len(labels.split()) == len(feedback.tokenize_prompt(prompts[uid(record["filename"])]))
        assert re.fullmatch(
            rf"{split}/[0-9a-f]{{8}}(-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}}\.png", raw["filename"]
        )


def test_some_prompts_need_quotes_in_csv(prompts):
    assert sum('"' in prompt and "," in prompt for prompt in prompts.values()) >= 4
    assert len(prompts) == 24


def test_images_are_files_of_three_formats(folder, prompts):
    paths = {path.stem: path for path in (folder / "images").iterdir()}
    assert set(paths) == set(prompts)
    formats = collections.Counter()
    for path in paths.values():
        with Image.open(path) as image:
            assert image.size == (64, 64)
            assert image.format == {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}[path.suffix]
            formats[image.format] += 1
    assert formats["JPEG"] > formats["PNG"] + formats["WEBP"]
    assert min(formats["PNG"], formats["WEBP"]) >= 3


def test_pick_a_pic_has_its_columns_and_splits(folder, prompts):
    label_uids = {
        split: {uid(r["filename"]) for r in read_labels(folder / f"labels/{split}.tfrecord")}
        for split in COUNTS
    }
    wanted = {"train": label_uids["train"] | label_uids["dev"], "test": label_uids["test"]}
    for split, shards in {"train": 3, "test": 2}.items():
        paths = sorted((folder / "pick_a_pic/data").glob(f"{split}-*"))
        assert len(paths) == shards
        rows = []
        for number, path in enumerate(paths):
            assert re.fullmatch(rf"{split}-{number:05}-of-{shards:05}-[0-9a-f]{{16}}\.parquet", path.name)
            file = pq.ParquetFile(path)
            assert len(file.schema_arrow) == 19
            assert file.schema_arrow.equals(sample_sources.PICK_A_PIC_SCHEMA)
            rows += file.read().to_pylist()
        seen = [row[f"image_{side}_uid"] for row in rows for side in (0, 1)]
        assert wanted[split] <= set(seen)
        assert not (set(prompts) - wanted[split]) & set(seen)
        assert max(seen.count(name) for name in wanted[split]) == 2
        without = [r for r in rows if not {r["image_0_uid"], r["image_1_uid"]} & wanted[split]]
        assert len(without) == len(rows) / 2
        for row in rows:
            for side in (0, 1):
                if (name := row[f"image_{side}_uid"]) in prompts:
                    (path,) = (folder / "images").glob(f"{name}.*")
                    assert row[f"jpg_{side}"] == path.read_bytes()
                    assert row["caption"] == prompts[name]


def test_pick_a_pic_has_several_row_groups_a_shard(folder):
    groups = [pq.ParquetFile(path).num_row_groups for path in (folder / "pick_a_pic/data").glob("train-*")]
    assert min(groups) >= 3


@pytest.mark.parametrize("split", COUNTS)
def test_joined_table_has_labels_image_and_prompt(folder, split, prompts):
    table = pq.read_table(folder / "joined" / f"{split}-00000-of-00001.parquet")
    assert table.schema.field("image").type == pa.struct({"bytes": pa.binary(), "path": pa.string()})
    assert table.schema.field("overall_score").type == pa.float32()
    records = read_labels(folder / "labels" / f"{split}.tfrecord")
    for row, record in zip(table.to_pylist(), records, strict=True):
        image = row.pop("image")
        assert image["bytes"] == (folder / "images" / image["path"]).read_bytes()
        assert row.pop("prompt") == prompts[uid(row["filename"])]
        for field in ("artifact_map", "misalignment_map"):
            assert row.pop(field)["bytes"] == record.pop(field)
        texts = {field: record.pop(field).decode() for field in ("filename", "prompt_misalignment_label")}
        assert row == record | texts


def test_web_captions_are_the_same_in_every_form(folder):
    tfrecord, parquet, webdataset = [], [], []
    for number in range(3):
        name = f"captions-{number:05}-of-00003"
        tfrecord += read_labels(folder / "web/tfrecord" / f"{name}.tfrecord")
        parquet += pq.read_table(folder / "web/parquet" / f"{name}.parquet").to_pylist()
        with tarfile.open(folder / "web/webdataset" / f"{name}.tar") as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for key in dict.fromkeys(name.partition(".")[0] for name in members):
            pair = {"image": members[f"{key}.jpg"], "caption": members[f"{key}.txt"].decode()}
            webdataset.append(pair | json.loads(members[f"{key}.json"]))
    assert webdataset == parquet
    texts = ("caption", "language")
    assert parquet == [pair | {name: pair[name].decode() for name in texts} for pair in tfrecord]
    assert all(Image.open(io.BytesIO(pair["image"])).format == "JPEG" for pair in parquet)
    lengths = [len(pair["caption"].split()) for pair in parquet]
    assert (len(lengths), lengths.count(1), sum(length > 200 for length in lengths)) == (24, 2, 2)
    assert {pair["language"] for pair in parquet} == {"en", "de"}


def test_another_process_writes_the_same_bytes(folder, tmp_path):
    out = tmp_path / "again"
    command = [sys.executable, "-m", "richhf_jax.datasets.sample_sources", f"--out={out}"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == f"{out}: 24 images of 64 pixels in every source's form\n"

    def contents(root):
        return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    assert contents(out) == contents(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"examples": 5}, "examples must be at least 6, got 5. Nothing written."),
        ({"image_size": 32}, "image_size must be 64 to 512, got 32. Nothing written."),
    ],
)
def test_bad_sizes(tmp_path, changes, message):
    with pytest.raises(errors.UserError, match=f"^{re.escape(message)}$"):
        sample_sources.write(tmp_path / "out", **changes)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(errors.UserError, match="is not empty: name a new directory with --out"):
        sample_sources.write(tmp_path)
    with pytest.raises(errors.UserError, match=r"mine\.txt is no directory: name a new one with --out"):
        sample_sources.write(tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
