"""Tests which parts of a source are read, from where, and the messages on bad files."""

import collections
import os
import pathlib
import zipfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tensorflow_datasets.proto import tf_example_pb2

from richhf_jax import errors, feedback
from richhf_jax.datasets import consolidate, sample_sources
from richhf_jax.datasets.rich_hf_18k import labels, remote, sources

IMAGE_BYTES = 100_000
ROWS, GROUPS = 4, 6
TRAIN = "train-00000-of-00001-0123456789abcdef.parquet"


def nothing(_: int) -> None:
    """Ignores progress."""


@pytest.fixture
def large(tmp_path, rng) -> str:
    """A folder with a shard of Pick-a-Pic in six row groups of four rows; the uids are 'g0r0s0', ..."""
    rows = [
        {
            "caption": f"prompt {group} {row}",
            **{f"image_{side}_uid": f"g{group}r{row}s{side}" for side in (0, 1)},
            **{f"jpg_{side}": rng.bytes(IMAGE_BYTES) for side in (0, 1)},
        }
        for group in range(GROUPS)
        for row in range(ROWS)
    ]
    table = pa.Table.from_pylist(rows, sample_sources.PICK_A_PIC_SCHEMA)
    pq.write_table(table, tmp_path / TRAIN, row_group_size=ROWS)
    return str(tmp_path)


class _Counted(fsspec.AbstractFileSystem):
    """Serves local files as a remote file system would, and notes everything that is fetched."""

    protocol = "counted"
    cachable = False
    fetched: list[tuple[int, int]]

    def ls(self, path, detail=True, **kwargs):
        return fsspec.filesystem("file").ls(path, detail=detail, **kwargs)

    def _open(self, path, mode="rb", **kwargs):
        kwargs.pop("autocommit", None)
        return _CountedFile(self, path, mode, size=pathlib.Path(path).stat().st_size, **kwargs)


class _CountedFile(fsspec.spec.AbstractBufferedFile):
    def _fetch_range(self, start, end):
        self.fs.fetched.append((start, end))
        return pathlib.Path(self.path).read_bytes()[start:end]


@pytest.fixture
def reads(monkeypatch) -> list[tuple[int, int]]:
    """Records (first byte, byte behind the last) of everything that is fetched from counted:// files."""
    fsspec.register_implementation("counted", _Counted, clobber=True)
    monkeypatch.setattr(_Counted, "fetched", [], raising=False)
    return _Counted.fetched


def read_chunks(folder: str, reads: list[tuple[int, int]]) -> set[tuple[int, str]]:
    """Records (row group, column) of the images whose bytes are read."""
    metadata = pq.ParquetFile(f"{folder}/{TRAIN}").metadata
    found = set()
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(index)
            if not chunk.path_in_schema.startswith("jpg"):
                continue
            start = min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)))
            # The footer is read with the last 64 KB of the file, give or take a page.
            middle = start + chunk.total_compressed_size // 2
            if any(first <= middle < last for first, last in reads):
                found.add((group, chunk.path_in_schema))
    return found


@pytest.mark.parametrize(
    ("uids", "chunks"),
    [
        ([], set()),
        (["another"], set()),
        (["g1r2s1"], {(1, "jpg_1")}),
        (["g1r2s1", "g1r3s1", "g3r0s0"], {(1, "jpg_1"), (3, "jpg_0")}),
        (["g0r0s0", "g0r0s1"], {(0, "jpg_0"), (0, "jpg_1")}),
    ],
)
def test_only_columns_and_row_groups_with_needed_images_are_read(large, reads, uids, chunks):
    source = sources.PickAPic(f"counted://{large}")
    (shard,) = source.shards()
    rows = list(source.rows(shard, uids, set(uids), nothing))
    assert sorted(row.uid for row in rows) == sorted(set(uids) - {"another"})
    assert all(len(row.image) == IMAGE_BYTES for row in rows)
    assert read_chunks(large, reads) == chunks
    # The rest is the footer, uids and captions.
    read = sum(last - first for first, last in reads)
    assert read < len(chunks) * ROWS * IMAGE_BYTES * 1.1 + 100_000


def test_images_that_are_not_missing_are_not_read(large, reads):
    source = sources.PickAPic(f"counted://{large}")
    (shard,) = source.shards()
    rows = list(source.rows(shard, ["g1r2s1", "g2r0s0"], {"g2r0s0"}, nothing))
    assert [(row.uid, row.prompt, row.image is None) for row in rows] == [
        ("g1r2s1", "prompt 1 2", True),
        ("g2r0s0", "prompt 2 0", False),
    ]
    assert rows[1].where == f"counted://{large}/{TRAIN}: row 8, jpg_0"
    assert read_chunks(large, reads) == {(2, "jpg_0")}


def test_memory_holds_one_column_of_one_row_group(large):
    source = sources.PickAPic(large)
    (shard,) = source.shards()
    uids = {f"g{group}r{row}s{side}" for group in range(GROUPS) for row in range(ROWS) for side in (0, 1)}
    before = pa.total_allocated_bytes()
    most = 0
    for row in source.rows(shard, uids, uids, nothing):
        assert len(row.image) == IMAGE_BYTES
        most = max(most, pa.total_allocated_bytes() - before)
    # One of twelve columns is in memory, three times: as stored, decompressed, and as arrow's array.
    assert most < 3.5 * ROWS * IMAGE_BYTES


def test_progress_adds_up_to_nearly_the_size(large):
    source = sources.PickAPic(large)
    (shard,) = source.shards()
    passed = []
    list(source.rows(shard, ["g1r2s1"], {"g1r2s1"}, passed.append))
    assert len(passed) == GROUPS
    assert sum(passed) == shard.size


def test_any_url(bench, samples):
    bench.write(samples)
    memory = fsspec.filesystem("memory")
    memory.put(str(bench.shards), "/bucket/data", recursive=True)
    try:
        assert bench.run("--pick_a_pic=memory://bucket/data") is None
    finally:
        memory.rm("/bucket", recursive=True)
    assert len(bench.examples()) == len(samples)


@pytest.mark.parametrize("path", ["nosuch://bucket/data", "memory://nowhere"])
def test_no_such_path(bench, samples, path):
    sample_sources.write_labels(bench.labels, samples)
    message = bench.run(f"--pick_a_pic={path}")
    assert path.partition("://")[0] in message


def test_reads_that_fail_are_tried_again(bench, samples, monkeypatch):
    bench.write(samples)
    failures = collections.Counter()
    waits = []
    read_at = remote._PatientFile._read_at

    def failing(self, start, size):
        failures[start] += 1
        if failures[start] % 3:
            raise ConnectionResetError("peer")
        return read_at(self, start, size)

    monkeypatch.setattr(remote._PatientFile, "_read_at", failing)
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    assert bench.run() is None
    assert set(waits) - {0} == {1, 2}  # Libraries let other threads run by sleep(0).


def test_reads_that_keep_failing_name_the_shard(bench, samples, monkeypatch, shards_read):
    bench.write(samples)
    read_at = remote._PatientFile._read_at

    def failing(self, start, size):
        if "/train-00001-" in self._path:
            raise TimeoutError("no answer")
        return read_at(self, start, size)

    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    with monkeypatch.context() as patch:
        patch.setattr(remote._PatientFile, "_read_at", failing)
        message = bench.run()
    assert message.startswith(f"{bench.shards}/train-00001-of-00003-")
    assert "TimeoutError: no answer" in message
    shards_read.clear()
    assert bench.run() is None
    assert [name[:11] for name in shards_read] == ["train-00001", "train-00002"]


def rewrite(path, change) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def swap(table: pa.Table, one: str, other: str) -> pa.Table:
    names = {one: other, other: one}
    return table.rename_columns([names.get(name, name) for name in table.column_names])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: swap(table, "caption", "image_0_uid"), "image_0_uid is '.* .*', which is no uid"),
        (lambda table: swap(table, "jpg_0", "image_0_uid"), r"expected: .*jpg_0 \(binary\).*\n.*found: .*"),
        (lambda table: table.drop_columns(["jpg_0", "jpg_1"]), r"jpg_1 \(binary\)\n    found: are_different"),
        (
            lambda table: table.set_column(0, "caption", pa.array(range(len(table)))),
            r"caption \(string\).*\n.*found: caption \(int64\)",
        ),
    ],
)
def test_columns_of_another_form(bench, samples, change, message):
    bench.write(samples)
    path = min(bench.shards.glob("train-*"))
    rewrite(path, change)
    error = bench.run()
    assert error.startswith(str(path))
    with pytest.raises(errors.UserError, match=message):
        raise errors.UserError(error)
    assert not bench.built


def test_swapped_columns_of_the_mirror(bench, samples):
    sample_sources.write_joined(bench.root / "joined", samples)
    path = bench.root / "joined/train-00000-of-00001.parquet"
    rewrite(path, lambda table: swap(table, feedback.FILENAME_FIELD, feedback.PROMPT_FIELD))
    assert f"{path}: row 0" in bench.run(f"--joined={bench.root}/joined", labels=False)


def test_git_lfs_pointers(bench, samples):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    bench.write(samples)
    path = min(bench.shards.glob("train-*"))
    path.write_bytes(pointer)
    assert bench.run().startswith(f"{path} is a pointer of Git LFS, not the file: run `git lfs pull`")
    (bench.labels / "dev.tfrecord").write_bytes(pointer)
    assert bench.run().startswith(f"{bench.labels}/dev.tfrecord is a pointer of Git LFS")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "id,text\na,b\n", "p.csv:2: expected uid and prompt"),
        ("p.csv", "uid,prompt\na prompt,1-2\n", "p.csv:2: expected uid and prompt"),
        ("p.jsonl", '{"uid": "a"\n', "p.jsonl:1: expected uid and prompt, got {"),
        ("p.csv", "uid,prompt\na,b\na,b\na,c\n", "p.csv:4: its prompt for a differs from an earlier one"),
        ("p.txt", "a b", "p.txt: no such file, or its name ends in neither .csv nor .jsonl"),
    ],
)
def test_prompts_of_another_form(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(errors.UserError, match=message):
        sources.Images(str(tmp_path), str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "text", "prompts", "problems"),
    [
        (
            "p.csv",
            b'uid,prompt\na,"b, c"\nd,e,f\ng,h\xff\ni j,k\nl,\nm,n\nm,o\np,"q',
            {"a": "b, c", "m": None},
            {
                3: "3 fields, but the header has 2",
                4: "the prompt isn't UTF-8",
                5: "expected uid and prompt, got",
                6: "the prompt is empty",
                8: "its prompt for m differs from an earlier one: none is taken",
                9: "unexpected end of data",
            },
        ),
        (
            "P.JSONL",
            b'{"uid": "a", "prompt": "b"}\n["a", "b"]\n\n{"uid": 1, "prompt": "c"}\n' + b'{"a":' * 100_000,
            {"a": "b"},
            {2: "expected uid and prompt", 4: "expected uid and prompt", 5: "nested"},
        ),
    ],
)
def test_one_bad_line_of_prompts_loses_no_other(tmp_path, name, text, prompts, problems):
    (tmp_path / name).write_bytes(text)
    (tmp_path / "a.png").write_bytes(b"")
    source = sources.Images(str(tmp_path), str(tmp_path / name))
    assert source._prompts == prompts
    assert len(source.problems) == len(problems)
    for line, (number, problem) in zip(source.problems, problems.items(), strict=True):
        assert line.startswith(f"{tmp_path / name}:{number}: ")
        assert problem in line


def test_two_files_of_an_image_are_listed_and_the_first_good_one_counts(bench, samples):
    sample_sources.write_labels(bench.labels, samples)
    sample_sources.write_images(bench.root, samples)
    sample = next(sample for sample in samples if sample.extension == "png")
    folder = bench.root / "images"
    (folder / f"{sample.uid}.png").rename(folder / f"{sample.uid}.PNG")
    (folder / f"{sample.uid}.jfif").write_bytes(b"no image")
    assert bench.run(f"--images={folder}", f"--prompts={bench.root}/prompts.csv") is None
    assert len(bench.examples()) == len(samples)
    (line,) = bench.report["source_problems"]
    assert line.startswith(f"{folder}/{sample.uid}.")
    assert f"{sample.uid} has {sample.uid}." in line
    assert "first of its files that is good" in line


def test_pipes_and_huge_files_of_images_are_not_read(bench, samples, monkeypatch):
    monkeypatch.setattr(sources, "MAX_IMAGE_BYTES", 100_000)
    sample_sources.write_labels(bench.labels, samples)
    sample_sources.write_images(bench.root, samples)
    pipe, huge = (bench.root / f"images/{sample.uid}.{sample.extension}" for sample in samples[:2])
    pipe.unlink()
    os.mkfifo(pipe)
    huge.write_bytes(bytes(100_001))
    assert bench.run(f"--images={bench.root}/images", f"--prompts={bench.root}/prompts.csv")
    assert bench.report["missing"] == [samples[0].record[feedback.FILENAME_FIELD]]
    (line,) = bench.report["undecodable"]
    assert f"{huge}: more than 100000 bytes" in line


def test_images_in_a_zip(tmp_path):
    """Some have names as no folder has them, and one is encrypted."""
    (tmp_path / "p.csv").write_text("uid,prompt\na,x\nb,y\nc,z\n")
    with zipfile.ZipFile(tmp_path / "i.zip", "w") as archive:
        for name, content in [("a.png", b"A"), ("/abs/b.png", b"B"), ("../c.JPG", b"C"), ("._a.png", b"")]:
            archive.writestr(name, content)
    data = bytearray((tmp_path / "i.zip").read_bytes())
    data[6] |= 1  # The flag of encryption of a.png, here and in the directory.
    data[data.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "i.zip").write_bytes(data)
    source = sources.Images(f"zip://::{tmp_path}/i.zip", str(tmp_path / "p.csv"))
    assert str(tmp_path) in source.description
    rows = [row for shard in source.shards() for row in source.rows(shard, "abc", "abc", nothing)]
    found = {row.uid: row.image or row.problem for row in rows}
    assert "encrypted" in found.pop("a")
    assert found.pop("b").endswith("/abs/b.png: no such file or folder")  # fsspec has no absolute names.
    assert found == {"c": b"C"}


def test_a_prompt_and_a_uid_that_are_not_utf8(bench, samples):
    bench.write(samples)
    good = {sample.uid for sample in samples}
    path = min(bench.shards.glob("train-*"))
    table = pq.read_table(path)
    wanted = [row for row, uid in enumerate(table["image_0_uid"].to_pylist()) if uid in good]
    for name, row in [("caption", wanted[0]), ("image_0_uid", 1 - min(wanted[0], 1))]:
        texts = [text.encode() for text in table[name].to_pylist()]
        texts[row] += b"\xff"
        index = table.column_names.index(name)
        table = table.set_column(index, name, pa.array(texts).view(pa.string()))
    source = sources.PickAPic(str(bench.shards))
    shard = next(shard for shard in source.shards() if shard.name == path.name)
    before = list(source.rows(shard, good, set(), nothing))
    pq.write_table(table, path)
    after = list(source.rows(shard, good, set(), nothing))
    assert [row.uid for row in after] == [row.uid for row in before]
    (bad,) = (row for row in after if row.problem)
    assert bad.problem == "the prompt isn't UTF-8"
    assert bad.where == f"{path}: row {wanted[0]}, jpg_0"
    assert len(after) > 1


def test_images_without_prompt_are_listed(bench, samples):
    sample_sources.write_labels(bench.labels, samples)
    sample_sources.write_images(bench.root, samples)
    prompts = bench.root / "prompts.csv"
    lines = prompts.read_text().splitlines(keepends=True)
    prompts.write_text("".join(line for line in lines if samples[0].uid not in line))
    assert bench.run(f"--images={bench.root}/images", f"--prompts={prompts}")
    assert "no prompt beside it" in bench.report["undecodable"][0]


def test_a_mirror_must_have_a_shard_of_each_split(bench, samples):
    joined = bench.root / "joined"
    sample_sources.write_joined(joined, samples)
    (joined / "dev-00000-of-00001.parquet").rename(joined / "validation-00000-of-00001.parquet")
    assert bench.run(f"--joined={joined}", labels=False) is None
    source = sources.Joined(str(joined))
    (joined / "test-00000-of-00001.parquet").rename(joined / "part-0.parquet")
    with pytest.raises(errors.UserError, match="part-0.parquet: its split is unknown"):
        source.label_records()
    (joined / "part-0.parquet").unlink()
    with pytest.raises(errors.UserError, match="no shard of test"):
        source.label_records()


@pytest.mark.parametrize("cut", [1, 5_000])
def test_a_torn_tfrecord_names_file_and_record_and_found_images_are_kept(bench, samples, shards_read, cut):
    bench.write(samples)
    path = bench.labels / "train.tfrecord"
    whole = path.read_bytes()
    test_shards = list(bench.shards.glob("test-*"))
    for shard in test_shards:
        shard.rename(bench.root / shard.name)
    assert bench.run()  # Two images are missing.
    path.write_bytes(whole[:-cut])
    number = len(complete_records(whole[:-cut]))
    message = bench.run()
    assert message.startswith(f"{path}: record {number} is cut off or corrupt, and so is the rest")
    path.write_bytes(whole)
    for shard in test_shards:
        (bench.root / shard.name).rename(shard)
    shards_read.clear()
    assert bench.run() is None
    assert {name[:5] for name in shards_read} == {"test-"}


def complete_records(data: bytes) -> list[int]:
    """Returns where the complete records of a TFRecord begin."""
    starts, position = [], 0
    while position + 12 <= len(data):
        end = position + 16 + int(np.frombuffer(data[position : position + 8], "<u8")[0])
        if end > len(data):
            break
        starts.append(position)
        position = end
    return starts


def test_a_flipped_bit_in_the_labels_leaves_out_one_record(bench, samples):
    bench.write(samples)
    path = bench.labels / "dev.tfrecord"
    data = bytearray(path.read_bytes())
    data[complete_records(data)[1] + 200] ^= 1
    path.write_bytes(data)
    assert bench.run().startswith("1 records have no image or a broken one, or are bad themselves")
    assert bench.report["bad_records"] == [f"{path}: record 1: garbled: its checksum is wrong"]
    assert bench.run("--allow-missing=1") is None
    assert len(bench.examples()) == len(samples) - 1
    assert bench.report["splits"]["dev"] == {"records": 2, "with_image": 1, "published": 995}


def test_a_garbled_length_in_the_labels(bench, samples):
    bench.write(samples)
    path = bench.labels / "dev.tfrecord"
    data = bytearray(path.read_bytes())
    data[complete_records(data)[1]] ^= 1
    path.write_bytes(data)
    assert bench.run().startswith(f"{path}: record 1 is cut off or corrupt")


SCORE = feedback.SCORE_FIELDS[feedback.OVERALL]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({feedback.FILENAME_FIELD: None}, f"it has no {feedback.FILENAME_FIELD}"),
        ({feedback.FILENAME_FIELD: 1.0}, "must be a bytes_list, got float_list"),
        ({feedback.FILENAME_FIELD: b"\xff.png"}, f"{feedback.FILENAME_FIELD} isn't UTF-8"),
        ({SCORE: 3.5}, f"{SCORE} is 3.5, not between 0 and 1"),
        ({SCORE: float("inf")}, f"{SCORE} is inf"),
    ],
)
def test_bad_records_are_named_and_the_others_kept(bench, samples, changes, message):
    bench.write(samples)
    first, second = (sample.record for sample in samples if sample.split == "test")
    changed = {field: value for field, value in {**first, **changes}.items() if value is not None}
    consolidate.write_tfrecord([changed, second], bench.labels / "test.tfrecord")
    assert bench.run().startswith("1 records have no image")
    (line,) = bench.report["bad_records"]
    assert line.startswith(f"{bench.labels}/test.tfrecord: record 0: ")
    assert message in line
    assert bench.run("--allow-missing=1") is None
    assert len(bench.examples()) == len(samples) - 1


def test_a_value_too_many(bench, samples):
    record = tf_example_pb2.Example()
    record.features.feature[SCORE].float_list.value.extend([0.5, 0.25])
    with pytest.raises(labels.BadRecordError, match=f"{SCORE} has 2 values"):
        labels.parse(record.SerializeToString())


def test_a_file_of_labels_is_missing(bench, samples):
    bench.write(samples)
    (bench.labels / "test.tfrecord").unlink()
    assert "test.tfrecord: No such file or directory; there must be one file for each split" in bench.run()


def test_uid_of():
    assert labels.uid_of("train/0a-1.png") == labels.uid_of("0a-1") == "0a-1"
