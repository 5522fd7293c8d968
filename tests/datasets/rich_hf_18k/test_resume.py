"""A stopped join continues behind the last finished shard; sources and labels are never mixed."""

import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from richhf_jax import feedback, locking
from richhf_jax.datasets import sample_sources
from richhf_jax.datasets.rich_hf_18k import join, sources

KILLED = """\
import itertools, os, signal, sys
from richhf_jax.datasets.rich_hf_18k import sources
from richhf_jax.datasets.rich_hf_18k.__main__ import main

rows = sources.PickAPic.rows
read = itertools.count()

def killed(self, shard, *arguments):
    number = next(read)
    for row in rows(self, shard, *arguments):
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        yield row

sources.PickAPic.rows = killed
main(sys.argv[1:])
"""


class Stopped(Exception):
    pass


def filenames(samples):
    return {sample.record[feedback.FILENAME_FIELD] for sample in samples}


def all_shards(bench) -> list[str]:
    return [shard.name for shard in sources.PickAPic(str(bench.shards)).shards()]


@pytest.mark.parametrize("stop_at", range(5))
def test_stopped_within_any_shard(bench, samples, shards_read, monkeypatch, stop_at):
    bench.write(samples)
    shards = all_shards(bench)
    assert len(shards) == 5
    rows = sources.PickAPic.rows

    def stopping(self, shard, *arguments):
        for row in rows(self, shard, *arguments):
            yield row
            if shard.name == shards[stop_at]:
                raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(sources.PickAPic, "rows", stopping)
        with pytest.raises(Stopped):
            bench.run()
    assert shards_read == shards[: stop_at + 1]
    assert not (bench.work_dir / "report.json").exists()
    shards_read.clear()
    assert bench.run() is None
    assert shards_read == shards[stop_at:]
    assert bench.examples().keys() == filenames(samples)
    assert list((bench.work_dir / "parts").glob("*.new")) == []


def test_killed(bench, samples, shards_read):
    bench.write(samples)
    arguments = [f"--data_dir={bench.data_dir}", f"--labels={bench.labels}", f"--pick_a_pic={bench.shards}"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, check=False)
    assert killed.returncode == -9
    assert len(join.parts(bench.work_dir)) == 2
    assert bench.run() is None
    assert shards_read == all_shards(bench)[2:]
    assert bench.examples().keys() == filenames(samples)


def test_reading_ends_when_everything_is_found(bench, samples, shards_read):
    bench.write(samples)
    first = bench.shards / "train-00000-of-00003-0000000000000000.parquet"
    tables = [pq.read_table(path) for path in sorted(bench.shards.glob("train*"))]
    pq.write_table(pa.concat_tables(tables), first)
    assert bench.run() is None
    # It has all train and dev images. Test images are in the test shards.
    assert [name for name in shards_read if not name.startswith("test-")] == [first.name]


def test_shards_that_cannot_have_what_is_missing_are_not_read(bench, samples, shards_read):
    bench.write(samples)
    shutil.rmtree(bench.shards)
    sample_sources.write_pick_a_pic(bench.shards, samples[:-1])
    last = bench.shards / "train-99999-of-99999-0000000000000000.parquet"
    shutil.copy(bench.shards / all_shards(bench)[-1], last)
    other = bench.shards / "validation-00000-of-00001-0000000000000000.parquet"
    shutil.copy(last, other)
    assert "1 records have no image" in bench.run()  # It is a test image.
    assert last.name not in shards_read
    assert shards_read[-1] == other.name


def test_shards_are_named_by_the_split_that_may_have_the_image(bench, samples, shards_read):
    bench.write(samples)
    for path in bench.shards.glob("test-*"):
        path.rename(path.with_name(path.name.replace("test-", "validation-")))
    assert bench.run() is None
    assert [name.partition("-")[0] for name in shards_read] == ["train"] * 3 + ["validation"] * 2


def test_a_shard_without_any_image_is_not_read_again(bench, samples, shards_read):
    bench.write(samples)
    shutil.rmtree(bench.shards)
    sample_sources.write_pick_a_pic(bench.shards, [s for s in samples if s.split != "train"])
    assert bench.run()
    assert shards_read == all_shards(bench)
    shards_read.clear()
    assert bench.run()
    assert shards_read == []


def test_finished_shards_may_go(bench, samples, shards_read):
    bench.write(samples)
    kept = bench.root / "kept"
    kept.mkdir()
    for path in bench.shards.glob("test-*"):
        path.rename(kept / path.name)
    assert "2 records have no image" in bench.run()
    for path in bench.shards.iterdir():
        path.unlink()
    assert "2 records have no image" in bench.run()
    for path in kept.iterdir():
        path.rename(bench.shards / path.name)
    shards_read.clear()
    assert bench.run() is None
    assert {name[:5] for name in shards_read} == {"test-"}
    assert bench.examples().keys() == filenames(samples)


def test_a_torn_shard_is_named_and_alone_is_read_again(bench, samples, shards_read):
    bench.write(samples)
    torn = bench.shards / all_shards(bench)[1]
    whole = torn.read_bytes()
    torn.write_bytes(whole[: len(whole) // 2])
    message = bench.run()
    assert "records have no image or a broken one" in message
    assert len(shards_read) == 5
    (line,) = bench.report["bad_shards"]
    assert line.startswith(f"{torn}: cut off or corrupt")
    shards_read.clear()
    assert bench.run() == message
    torn.write_bytes(whole)
    assert bench.run() is None
    assert shards_read == [torn.name] * 2
    assert bench.examples().keys() == filenames(samples)


def test_what_a_corrupt_shard_still_has_is_kept(bench, samples):
    sample_sources.write_labels(bench.labels, samples)
    sample_sources.write_joined(bench.root / "joined", samples)
    path = bench.root / "joined/train-00000-of-00001.parquet"  # two row groups of four rows
    column = pq.ParquetFile(path).schema_arrow.get_field_index(feedback.IMAGE_FIELD)
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(column)
    data = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)
    joined = f"--joined={bench.root}/joined"
    assert "4 records have no image" in bench.run(joined)
    (line,) = bench.report["bad_shards"]
    assert line.startswith(f"{path}: row group 0 is corrupt")
    assert bench.run(joined, "--allow-missing=4") is None
    assert bench.examples().keys() == filenames(samples[4:])


def test_a_changed_shard_is_read_again(bench, samples, shards_read):
    bench.write(samples)
    shutil.rmtree(bench.shards)
    sample_sources.write_pick_a_pic(bench.shards, samples[:11])
    assert bench.run()
    sizes = {path.name: path.stat().st_size for path in bench.shards.iterdir()}
    shutil.rmtree(bench.shards)
    sample_sources.write_pick_a_pic(bench.shards, samples)
    changed = [name for name in all_shards(bench) if (bench.shards / name).stat().st_size != sizes[name]]
    shards_read.clear()
    assert bench.run() is None
    assert changed
    assert shards_read == changed
    assert bench.examples().keys() == filenames(samples)


def test_another_source_is_not_mixed_in(bench, samples):
    bench.write(samples)
    other = bench.root / "other"
    # A mistyped path isn't noted as another source.
    assert "no such path" in bench.run(f"--pick_a_pic={other}")
    shutil.copytree(bench.shards, other)
    shutil.rmtree(bench.shards)
    sample_sources.write_pick_a_pic(bench.shards, samples[:6])
    assert "6 records have no image" in bench.run()
    message = bench.run(f"--pick_a_pic={other}")
    assert "holds a join with another source" in message
    assert str(other) in message
    assert bench.run(f"--pick_a_pic={other}", f"--work_dir={bench.root}/another") is None


def test_labels_of_more_images_are_not_mixed_in_and_corrected_labels_are(bench, samples):
    bench.write(samples)
    shutil.rmtree(bench.labels)
    sample_sources.write_labels(bench.labels, samples[1:])
    shutil.rmtree(bench.shards)
    sample_sources.write_pick_a_pic(bench.shards, samples[2:])
    assert "1 records have no image" in bench.run()
    shutil.rmtree(bench.labels)
    sample_sources.write_labels(bench.labels, samples)
    assert "a join that didn't look for 1 of these labels' images" in bench.run()
    shutil.rmtree(bench.labels)
    record = {**samples[2].record, feedback.KEYWORDS_FIELD: "1"}
    corrected = [sample_sources.dataclasses.replace(samples[2], record=record), *samples[3:]]
    sample_sources.write_labels(bench.labels, corrected)
    assert bench.run() is None
    example = bench.examples()[record[feedback.FILENAME_FIELD]]
    assert example[feedback.KEYWORDS_FIELD] == b"1"


def test_missing_files_may_be_added_to_a_folder(bench, samples, shards_read):
    sample_sources.write_labels(bench.labels, samples)
    sample_sources.write_images(bench.root, samples)
    late = bench.root / "images" / f"{samples[0].uid}.{samples[0].extension}"
    data = late.read_bytes()
    late.write_bytes(data[:-50])
    options = [f"--images={bench.root}/images", f"--prompts={bench.root}/prompts.csv"]
    assert "1 records have no image or a broken one" in bench.run(*options)
    assert f"{late}: broken" in bench.report["undecodable"][0]
    late.write_bytes(data)
    shards_read.clear()
    assert bench.run(*options) is None
    assert len(shards_read) == 1
    assert bench.examples().keys() == filenames(samples)


def test_two_processes_do_not_join_into_the_same_folder(bench, samples):
    bench.write(samples)
    with locking.held(bench.work_dir, "--work_dir"):
        assert "another process (host " in bench.run()
    assert bench.run() is None
