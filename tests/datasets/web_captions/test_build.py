import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from richhf_jax import errors
from richhf_jax.datasets import records, sample_sources
from richhf_jax.datasets.web_captions import __main__ as command
from richhf_jax.datasets.web_captions import build, convert, shards

FORMATS = {"tfrecord": "tfrecord", "webdataset": "tar", "parquet": "parquet"}
GOOD = ["the first caption", "the second caption", "the third caption"]
PAIRS = sample_sources.make_web_pairs(24)
CAPTIONS = [pair["caption"] for pair in PAIRS]


@pytest.fixture(scope="session")
def web(tmp_path_factory):
    folder = tmp_path_factory.mktemp("web")
    sample_sources.write_web(folder, PAIRS)
    return folder


@pytest.fixture
def read_shards(monkeypatch):
    """Records the names of the shards that are read."""
    names = []
    read = shards.read

    def recording(shard, wanted, count):
        names.append(pathlib.PurePath(shard.url).name)
        return read(shard, wanted, count)

    monkeypatch.setattr(shards, "read", recording)
    return names


def run(data_dir, *patterns, processes=1, **options):
    flags = [f"--{name}={value}" if value is not True else f"--{name}" for name, value in options.items()]
    command.main(
        [f"--shards={pattern}" for pattern in patterns]
        + [f"--data_dir={data_dir}", f"--processes={processes}", *flags]
    )


def folder_of(data_dir, incomplete=False):
    return pathlib.Path(data_dir, "web_captions/default/1.0.0" + (".incomplete" if incomplete else ""))


def built(data_dir, split="train"):
    """Reads (file name, image's bytes, prompt) of each example, in the order of the files."""
    builder = tfds.builder("web_captions:1.0.0", data_dir=data_dir)
    config = tfds.ReadConfig(interleave_cycle_length=1)
    skip = {"image": tfds.decode.SkipDecoding()}
    dataset = builder.as_dataset(split=split, decoders=skip, read_config=config)
    return [
        (example["filename"].decode(), example["image"], example["prompt"].decode())
        for example in dataset.as_numpy_iterator()
    ]


def prompts(data_dir):
    return [prompt for _, _, prompt in built(data_dir)]


def listed(folder):
    """Reads errors.jsonl as (file's name, record, reason)."""
    lines = map(json.loads, (folder / "errors.jsonl").read_text().splitlines())
    return [(pathlib.PurePath(line["file"]).name, line["record"], line["reason"]) for line in lines]


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def jpeg(side=16):
    return sample_sources.encode(np.full((side, side, 3), 99, np.uint8), "jpg")


def write_parquet(path, captions, **more):
    rows = {"image": [jpeg()] * len(captions), "caption": captions, **more}
    pq.write_table(pa.table(rows), path, row_group_size=2, compression="none")


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_what_is_in_it(form, web, tmp_path):
    pattern = f"{web}/{form}/captions-{{00000..00001}}-of-00003.*"
    run(tmp_path, pattern, validation_shards=f"{web}/{form}/*-00002-of-*")
    for split, numbers in {"train": [0, 1], "validation": [2]}.items():
        found = built(tmp_path, split)
        kept = [
            (f"captions-{number:05}-of-00003.{FORMATS[form]}", pair)
            for number in numbers
            for pair in PAIRS[number::3]
            if 3 <= len(pair["caption"].split()) <= 64
        ]
        assert len(kept) > 5
        assert [name.partition("/")[0] for name, _, _ in found] == [name for name, _ in kept]
        assert [image for _, image, _ in found] == [pair["image"] for _, pair in kept]
        assert [prompt for _, _, prompt in found] == [pair["caption"] for _, pair in kept]
        assert len({name for name, _, _ in found}) == len(found)
    assert listed(folder_of(tmp_path)) == []


def test_seqio_and_tfds_open_it(web, tmp_path):
    run(tmp_path, f"{web}/tfrecord/*", f"{web}/parquet/*")
    builder = tfds.builder("web_captions/default:1.0.0", data_dir=tmp_path)
    assert set(builder.info.features) == {"filename", "image", "prompt"}
    assert builder.info.features["image"].shape == (None, None, 3)
    assert builder.info.splits["train"].num_shards == 6
    source = seqio.TfdsDataSource(
        "web_captions/default:1.0.0", str(tmp_path), splits=["train"], read_only=True
    )
    (example, *_) = source.get_dataset("train", shuffle=False).as_numpy_iterator()
    np.testing.assert_array_equal(example["image"], tf.io.decode_image(PAIRS[0]["image"]))
    assert (folder_of(tmp_path) / records.INDEX_NAME).exists()
    assert not (folder_of(tmp_path) / "shards").exists()


def test_filters_are_counted(web, tmp_path, capsys):
    run(tmp_path, f"{web}/webdataset/*", languages="DE,fr", max_words=8)
    words = [len(caption.split()) for caption in CAPTIONS]
    good = [p for p, count in zip(PAIRS, words, strict=True) if 3 <= count <= 8]
    german = [pair["caption"] for pair in good if pair["language"] == "de"]
    assert 0 < len(german) < len(good)
    assert sorted(prompts(tmp_path)) == sorted(german)
    few, many = sum(count < 3 for count in words), sum(count > 8 for count in words)
    assert (
        f"{len(german)} train; left out: {few} too few words, {many} too many words,"
        f" {len(good) - len(german)} other language, 0 too small, 0 bad;" in capsys.readouterr().out
    )


def test_any_storage_of_fsspec(web, tmp_path):
    memory = fsspec.filesystem("memory")
    for path in (web / "parquet").iterdir():
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    run(tmp_path / "memory", "memory://bucket/*-{00000..00002}-of-*")
    run(tmp_path / "local", f"{web}/parquet/*")
    assert built(tmp_path / "memory") == built(tmp_path / "local")


def test_two_processes_write_what_one_writes(web, tmp_path):
    patterns = [f"{web}/{form}/*" for form in FORMATS]
    for processes in (1, 2):
        run(tmp_path / str(processes), *patterns, processes=processes, languages="en")
    one, two = (files_of(tmp_path / str(processes)) for processes in (1, 2))
    assert len(one) > len(FORMATS) * 3
    assert one == two


@pytest.mark.parametrize("processes", [1, 2])
def test_progress_counts_every_byte_once(processes, web, tmp_path):
    found = shards.find([f"{web}/{form}/*" for form in FORMATS])
    (tmp_path / "shards").mkdir()
    jobs = build._jobs("train", found, tmp_path, convert.Options(), skip_bad=False)
    counted = []
    done = dict(build._results(jobs, processes, counted.append))
    assert done == dict.fromkeys(jobs, "")
    assert sum(counted) == sum(shard.size for shard in found)


# Each image takes a while, so that the process can be killed in between.
SLOW_COMMAND = """
import sys, time
from richhf_jax.inputs import images
from richhf_jax.datasets.web_captions import __main__
checked = images.checked
images.checked = lambda data: (time.sleep(0.1), checked(data))[1]
__main__.main(sys.argv[1:])
"""


def test_killed_and_run_again(web, tmp_path, read_shards):
    arguments = [f"--shards={web}/tfrecord/*", "--processes=1"]
    program = subprocess.Popen(
        [sys.executable, "-c", SLOW_COMMAND, *arguments, f"--data_dir={tmp_path / 'killed'}"]
    )
    incomplete = folder_of(tmp_path / "killed", incomplete=True)
    while not list(incomplete.glob("shards/*.json")):
        assert program.poll() is None
        time.sleep(0.01)
    program.kill()
    assert program.wait() == -signal.SIGKILL
    finished = len(list(incomplete.glob("shards/*.json")))
    assert 1 <= finished < 3
    assert not folder_of(tmp_path / "killed").exists()

    run(tmp_path / "killed", f"{web}/tfrecord/*")
    names = sorted(path.name for path in (web / "tfrecord").iterdir())
    assert read_shards == names[finished:]
    run(tmp_path / "whole", f"{web}/tfrecord/*")
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_killed_at_the_first_and_at_the_last_moment(web, tmp_path):
    # Folders are made before build.json, and removed after the data set is in its place.
    (folder_of(tmp_path, incomplete=True) / "shards").mkdir(parents=True)
    run(tmp_path, f"{web}/tfrecord/*")
    before = files_of(tmp_path)
    (folder_of(tmp_path) / "shards").mkdir()
    (folder_of(tmp_path) / "shards/left.json").write_text("{}")
    run(tmp_path, f"{web}/tfrecord/*")
    assert files_of(tmp_path) == before


def test_a_finished_build_is_left_alone(web, tmp_path, read_shards, capsys):
    run(tmp_path, f"{web}/tfrecord/*")
    before, report = files_of(tmp_path), capsys.readouterr().out
    run(tmp_path, f"{web}/tfrecord/*", processes=2)
    assert len(read_shards) == 3
    assert (files_of(tmp_path), capsys.readouterr().out) == (before, report)


@pytest.mark.parametrize("finished", [True, False])
def test_another_build_in_the_same_folder(finished, web, tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"")
    given = [f"{web}/tfrecord/*"] + ([] if finished else [tmp_path / "broken.parquet"])
    if finished:
        run(tmp_path, *given)
    else:
        with pytest.raises(SystemExit, match="can't be read"):
            run(tmp_path, *given)
    before = files_of(tmp_path)
    with pytest.raises(SystemExit, match=r"1\.0\.0.* is with another --min_words, --max_words\. Give what"):
        run(tmp_path, *given, min_words=4, max_words=40)
    with pytest.raises(SystemExit, match="is of other shards"):
        run(tmp_path, f"{web}/tfrecord/*00001*")
    assert files_of(tmp_path) == before


def test_a_build_of_a_version_with_another_default(web, tmp_path):
    run(tmp_path, f"{web}/tfrecord/*")
    (path,) = tmp_path.rglob("build.json")
    content = json.loads(path.read_text())
    content["options"]["image_fields"] = ["image", "jpg", "jpeg", "png", "webp", "image/encoded"]
    path.write_text(json.dumps(content))
    run(tmp_path, f"{web}/tfrecord/*")
    with pytest.raises(SystemExit, match="is with another --image_fields"):
        run(tmp_path, f"{web}/tfrecord/*", image_fields="image,jpg")


def test_bad_samples_are_listed_and_counted(tmp_path, capsys):
    for number, image in enumerate((b"<!DOCTYPE html>", jpeg()[:-100])):
        images = pa.array([image, jpeg()], pa.binary())
        write_parquet(tmp_path / f"{number}.parquet", GOOD[:2], image=images)
    run(tmp_path, f"{tmp_path}/*.parquet")
    assert prompts(tmp_path) == GOOD[1:2] * 2
    (first, second) = listed(folder_of(tmp_path))
    assert first == ("0.parquet", "0", "an HTML page, not an image")
    assert second[:2] == ("1.parquet", "0")
    assert "2 bad, see errors.jsonl" in capsys.readouterr().out


UNREADABLE = {
    "empty.parquet": (b"", "no whole parquet file"),
    "empty.tar": (b"", "nothing in it is good; first: cut off"),
    "page.tfrecord": (b"<!DOCTYPE html>", "nothing in it is good; 0: its length is garbled"),
    "page.tar": (b"<!DOCTYPE html>" * 100, "nothing in it is good; first: cut off or broken here"),
}


@pytest.mark.parametrize("processes", [1, 2])
def test_unreadable_shards_are_tried_again_alone(processes, web, tmp_path, read_shards):
    for name, (content, _) in UNREADABLE.items():
        (tmp_path / name).write_bytes(content)
    write_parquet(tmp_path / "whole.parquet", GOOD)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, f"{tmp_path}/*.*", processes=processes)
    assert "4 shards can't be read" in stopped.value.code
    for name, (_, reason) in UNREADABLE.items():
        assert f"{tmp_path / name}: {reason}" in stopped.value.code
    assert [name for name, _, _ in listed(folder_of(tmp_path, incomplete=True))] == sorted(UNREADABLE)

    forms = {".parquet": "parquet", ".tar": "webdataset", ".tfrecord": "tfrecord"}
    for name in UNREADABLE:
        (good, *_) = (web / forms[pathlib.Path(name).suffix]).iterdir()
        shutil.copy(good, tmp_path / name)
    read_shards.clear()
    run(tmp_path, f"{tmp_path}/*.*")
    assert read_shards == sorted(UNREADABLE)
    assert prompts(tmp_path)[-3:] == GOOD
    assert len(prompts(tmp_path)) > 4 * 5 + 3
    assert listed(folder_of(tmp_path)) == []


def test_unreadable_shards_left_out(tmp_path, capsys):
    (tmp_path / "a.parquet").write_bytes(b"")
    write_parquet(tmp_path / "b.parquet", GOOD)
    with pytest.raises(SystemExit, match="with --skip_bad_shards"):
        run(tmp_path, f"{tmp_path}/*.parquet")
    run(tmp_path, f"{tmp_path}/*.parquet", skip_bad_shards=True)
    assert prompts(tmp_path) == GOOD
    ((name, record, reason),) = listed(folder_of(tmp_path))
    assert (name, record) == ("a.parquet", "")
    assert reason.startswith("no whole parquet file")
    assert "1 bad, see errors.jsonl" in capsys.readouterr().out


def test_a_changed_shard_is_converted_again(tmp_path, read_shards):
    write_parquet(tmp_path / "a.parquet", GOOD[:1])
    write_parquet(tmp_path / "b.parquet", GOOD[:1])
    (tmp_path / "c.parquet").write_bytes(b"")
    with pytest.raises(SystemExit):
        run(tmp_path, f"{tmp_path}/*.parquet")
    write_parquet(tmp_path / "b.parquet", GOOD)
    read_shards.clear()
    run(tmp_path, f"{tmp_path}/*.parquet", skip_bad_shards=True)
    assert read_shards == ["b.parquet", "c.parquet"]
    assert prompts(tmp_path) == GOOD[:1] + GOOD


def test_nothing_left(tmp_path):
    write_parquet(tmp_path / "a.parquet", GOOD)
    with pytest.raises(SystemExit, match=r"No sample is left for train.* 3 too few words"):
        run(tmp_path, tmp_path / "a.parquet", min_words=9)
    assert not folder_of(tmp_path).exists()


def test_an_empty_shard_is_no_mistake(web, tmp_path):
    (tmp_path / "empty.tfrecord").write_bytes(b"")
    run(tmp_path, tmp_path / "empty.tfrecord", f"{web}/tfrecord/*-00001-*")
    assert tfds.builder("web_captions:1.0.0", data_dir=tmp_path).info.splits["train"].shard_lengths[0] == 0
    assert len(built(tmp_path)) > 5


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a-{0..1}.tar", r"a-1\.tar: no such file"),
        ("*.parquet", r"\*\.parquet: no such file"),
        ("a.zip", r"a\.zip: neither \.tfrecord, \.tar"),
    ],
)
def test_patterns_that_name_nothing(pattern, message, tmp_path):
    for name in ("a-0.tar", "a.zip"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(SystemExit, match=message):
        run(tmp_path / "data", tmp_path / pattern)
    assert not (tmp_path / "data").exists()


class Killer:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (9,)


def test_a_killed_process_is_told_of():
    with pytest.raises(errors.UserError, match="fewer --processes"):
        list(build._results([Killer(), Killer()], 2, lambda number: None))


def test_a_folder_that_cant_be_written(tmp_path):
    write_parquet(tmp_path / "a.parquet", GOOD)
    (tmp_path / "data").write_text("no folder")
    with pytest.raises(SystemExit, match="data.*: Not a directory"):
        run(tmp_path / "data", tmp_path / "a.parquet")


def test_processes_start_without_tensorflow():
    code = "import sys, richhf_jax.datasets.web_captions.build; print('tensorflow' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
