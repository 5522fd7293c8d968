import gzip
import io
import os
import tarfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tensorflow_datasets.proto import tf_example_pb2

from richhf_jax import errors
from richhf_jax.datasets import sample_sources, tfrecord
from richhf_jax.datasets.web_captions import convert, shards

FORMATS = ("tfrecord", "webdataset", "parquet")
GOOD = ["the first caption", "the second caption", "the third caption"]


@pytest.fixture(scope="session")
def web(tmp_path_factory):
    folder = tmp_path_factory.mktemp("web")
    sample_sources.write_web(folder, sample_sources.make_web_pairs(24))
    return folder


def converted(path, **options):
    """Converts a shard; returns (file name, image, prompt) of kept and (record, reason) of bad samples."""
    out = path.with_suffix(".out")
    shard = shards.Shard(str(path), path.stat().st_size)
    job = convert.Job(shard, out, path.with_suffix(".json"), convert.Options(**options), skip_bad=False)
    assert convert.convert(job, lambda number: None) == ""
    kept = []
    with out.open("rb") as file:
        for record in tfrecord.read(file):
            features = tf_example_pb2.Example.FromString(record).features.feature
            image, *texts = (features[name].bytes_list.value[0] for name in ("image", "filename", "prompt"))
            kept.append((texts[0].decode(), image, texts[1].decode()))
    state = convert.read_state(job)
    assert state.counts.get(convert.KEPT, 0) == len(kept)
    assert {line["file"] for line in state.errors} <= {str(path)}
    return kept, [(line["record"], line["reason"]) for line in state.errors]


def prompts(path, **options):
    return [prompt for _, _, prompt in converted(path, **options)[0]]


def jpeg(side=16):
    return sample_sources.encode(np.full((side, side, 3), 99, np.uint8), "jpg")


def write_parquet(path, captions, **more):
    rows = {"image": [jpeg()] * len(captions), "caption": captions, **more}
    pq.write_table(pa.table(rows), path, row_group_size=2, compression="none")


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize(
    ("language", "kept"), [("en", True), ("en-GB", True), ("EN", True), ("eng", False), ("de", False)]
)
def test_languages(language, kept):
    sample = shards.Sample("0", {"caption": "three words here", "lang": language, "image": jpeg()})
    verdict, _, _ = convert.judge(sample, convert.Options(languages=("fr", "en")))
    assert verdict == (convert.KEPT if kept else convert.OTHER_LANGUAGE)


def test_small_images_are_left_out(tmp_path):
    pictures = [
        sample_sources.encode(np.zeros((*shape, 3), np.uint8), "png") for shape in ((20, 9), (10, 30))
    ]
    write_parquet(tmp_path / "a.parquet", ["a small picture", "a large picture"], image=pictures)
    assert prompts(tmp_path / "a.parquet", min_side=10) == ["a large picture"]


def test_white_space_of_a_caption_is_one_space(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["  a red\n\tstar "])
    assert prompts(tmp_path / "a.parquet") == ["a red star"]


def test_webdataset_groups_files_by_key(tmp_path):
    members = {
        "a/0.JPG": jpeg(),
        "a/0.seg.png": b"another picture of it",
        "a/0.json": b'{"caption": "a caption in json"}',
        "b/0.txt": b"a caption of its own",
        "b/0.webp": sample_sources.encode(np.zeros((8, 8, 3), np.uint8), "webp"),
    }
    write_tar(tmp_path / "a.tar.gz", members, "w:gz")
    found, _ = converted(tmp_path / "a.tar.gz")
    assert [(name, prompt) for name, _, prompt in found] == [
        ("a.tar.gz/a/0", "a caption in json"),
        ("a.tar.gz/b/0", "a caption of its own"),
    ]
    assert [image for _, image, _ in found] == [members["a/0.JPG"], members["b/0.webp"]]


def test_hugging_face_images_and_own_columns(tmp_path):
    table = pa.table({"picture": [{"bytes": jpeg(), "path": "1.jpg"}], "title": ["a title of it"]})
    pq.write_table(table, tmp_path / "a.parquet")
    fields = {"image_fields": ("photo", "picture"), "caption_fields": ("title",)}
    found, _ = converted(tmp_path / "a.parquet", **fields)
    assert [(image, prompt) for _, image, prompt in found] == [(jpeg(), "a title of it")]


def test_entries_of_json_hide_no_file(tmp_path):
    other = sample_sources.encode(np.zeros((8, 8, 3), np.uint8), "png")
    members = {
        "0.jpg": jpeg(),
        "0.json": b'{"image": "train/0.jpg", "caption": "a caption in json"}',
        "1.jpg": jpeg(),
        "1.json": b'{"jpg": "https://example.org/1.jpg", "png": null, "text": ["no", "text"], "caption": 5}',
        "1.txt": b"a caption in text",
        "2.png": other,
        "2.json": b'{"image": {"bytes": "AAAA"}, "caption": "a caption in json", "txt": "another one"}',
        "2.txt": b"a caption in text",
        "2b.JFIF": jpeg(8),
        "2b.txt": b"a jpeg of another name",
        "3.json": b'{"image": "train/3.jpg", "caption": "no image beside it"}',
    }
    write_tar(tmp_path / "a.tar", members)
    kept, found = converted(tmp_path / "a.tar")
    captions = {
        "0": "a caption in json",
        "1": "a caption in text",
        "2": "a caption in json",
        "2b": "a jpeg of another name",
    }
    assert {name.rpartition("/")[2]: prompt for name, _, prompt in kept} == captions
    assert [image for _, image, _ in kept] == [jpeg(), jpeg(), other, jpeg(8)]
    assert found == [("3", "the image isn't bytes but str")]


def test_a_tar_as_people_pack_it(tmp_path):
    """Hidden files, hard links, a symbolic link and a file that comes twice."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:

        def add(name, content=b"", kind=tarfile.REGTYPE, target=""):
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = len(content), kind, target
            tar.addfile(member, io.BytesIO(content))

        add("./label", kind=b"V")
        add("./._0.jpg", b"\0\5\x16\7")
        add("./0.jpg", jpeg())
        add("./0.txt", GOOD[0].encode())
        add("./1.jpg", kind=tarfile.LNKTYPE, target="./0.jpg")
        add("./1.txt", GOOD[1].encode())
        add("./2.jpg", kind=tarfile.SYMTYPE, target="0.jpg")
        add("./2.txt", GOOD[2].encode())
        add("./3.jpg", jpeg(8))
        add("./3.JPG", jpeg())
        add("./3.txt", GOOD[2].encode())
        add("./4.jpg", kind=tarfile.LNKTYPE, target="./gone.jpg")
        add("./4.txt", GOOD[2].encode())
        add("./.5.jpg", jpeg())
        add("./.5.txt", GOOD[2].encode())
    for path in (tmp_path / "a.tar", tmp_path / "a.tar.gz"):
        path.write_bytes((bytes, gzip.compress)[path.suffix == ".gz"]((tmp_path / "a.tar").read_bytes()))
        kept, found = converted(path)
        assert [(name, image, prompt) for name, image, prompt in kept] == [
            (f"{path.name}/0", jpeg(), GOOD[0]),
            (f"{path.name}/1", jpeg(), GOOD[1]),
        ]
        assert found == [
            ("2", "2.jpg is a symbolic link to 0.jpg; pack the tar with `tar --dereference`"),
            ("3", "3.JPG: the sample has two of these files"),
            ("4", "4.jpg is a hard link to gone.jpg, which isn't before it in the tar"),
            (".5", ".5.jpg is hidden, as its name begins with a dot; rename it"),
        ]


def test_json_that_nests_too_deep_is_one_bad_sample(tmp_path):
    write_tar(tmp_path / "a.tar", {"0.json": b'{"a":' * 100_000, "1.jpg": jpeg(), "1.txt": GOOD[0].encode()})
    kept, ((record, reason),) = converted(tmp_path / "a.tar")
    assert [prompt for _, _, prompt in kept] == GOOD[:1]
    assert record == "0"
    assert "0.json: no JSON" in reason


def test_files_of_a_sample_that_are_larger_than_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_IMAGE_BYTES", 1000)
    text = b"many words " * 90
    write_tar(
        tmp_path / "a.tar", {"0.jpg": jpeg(), "0.txt": text, "1.jpg": jpeg(), "1.txt": GOOD[0].encode()}
    )
    kept, found = converted(tmp_path / "a.tar")
    assert [prompt for _, _, prompt in kept] == GOOD[:1]
    assert found == [("0", "its files have more than 1000 bytes")]


def test_a_caption_that_is_longer_than_any(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "MAX_TEXT_BYTES", 20)
    write_parquet(tmp_path / "a.parquet", ["three words here", "many words " * 20])
    kept, found = converted(tmp_path / "a.parquet")
    assert [prompt for _, _, prompt in kept] == ["three words here"]
    assert found == [("1", "the caption has 220 characters; at most 20 are taken")]


def test_more_bad_samples_than_are_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "_MAX_LISTED", 2)
    write_parquet(tmp_path / "a.parquet", ["a good one", *[None] * 5])
    _, found = converted(tmp_path / "a.parquet")
    assert [record for record, _ in found] == ["1", "2", ""]
    assert found[-1][1] == "3 more samples are bad"


def test_text_that_is_not_utf8_is_one_bad_row(tmp_path):
    captions = pa.array([GOOD[0].encode(), b"caf\xe9 au lait", GOOD[2].encode()]).view(pa.string())
    images = pa.array([{"bytes": jpeg(), "path": path} for path in ("a", None, "c")])
    table = pa.table({"image": images, "caption": captions})
    pq.write_table(table, tmp_path / "a.parquet")
    kept, ((record, reason),) = converted(tmp_path / "a.parquet")
    assert [prompt for _, _, prompt in kept] == [GOOD[0], GOOD[2]]
    assert record == "1"
    assert "'utf-8' codec can't decode" in reason


def test_columns_of_one_name_are_told(tmp_path):
    table = pa.Table.from_arrays([pa.array([GOOD[0]])] * 2, ["caption", "caption"])
    pq.write_table(table, tmp_path / "a.parquet")
    shard = shards.Shard(str(tmp_path / "a.parquet"), 0)
    with pytest.raises(shards.ShardError, match="a column is there twice"):
        list(shards.read(shard, {"caption"}, lambda number: None))


def test_a_table_without_the_wanted_columns(tmp_path):
    pq.write_table(pa.table({"other": [1, 2, 3]}), tmp_path / "a.parquet")
    shard = shards.Shard(str(tmp_path / "a.parquet"), 0)
    assert len(list(shards.read(shard, {"caption"}, lambda number: None))) == 3


def test_a_finished_shard_whose_output_is_gone_or_damaged_is_converted_again(tmp_path):
    write_parquet(tmp_path / "a.parquet", GOOD)
    shard = shards.Shard(str(tmp_path / "a.parquet"), (tmp_path / "a.parquet").stat().st_size)
    job = convert.Job(shard, tmp_path / "out", tmp_path / "state.json", convert.Options(), skip_bad=False)
    assert convert.convert(job, lambda number: None) == ""
    whole = job.out.read_bytes()
    assert convert.read_state(job).counts == {convert.KEPT: 3}
    job.out.write_bytes(whole[:-1])
    assert convert.read_state(job) is None
    job.out.unlink()
    assert convert.read_state(job) is None
    job.out.write_bytes(whole)
    job.state.write_bytes(bytes(200))
    assert convert.read_state(job) is None


def test_pipes_are_no_shards(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    for pattern in ("a.tar", "*.tar"):
        with pytest.raises(errors.UserError, match="no such file"):
            shards.find([f"{tmp_path}/{pattern}"])


# A broken shard: its name, how it is written, its kept captions, (record, reason) of the others.


def tar_of_three(path):
    write_tar(
        path, {f"{n}.{x}": d for n in range(3) for x, d in (("jpg", jpeg()), ("txt", GOOD[n].encode()))}
    )


def truncated_tar(path):
    tar_of_three(path)
    path.write_bytes(path.read_bytes()[: 2 * 4 * 512 + 700])


def garbled_tar(path):
    tar_of_three(path)
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        data[tar.getmember("1.jpg").offset + 10] ^= 1
    path.write_bytes(data)


def tar_cut_between_members(path):
    tar_of_three(path)
    path.write_bytes(path.read_bytes()[: 2 * 4 * 512 + 2 * 512])


def truncated_tar_gz(path):
    tar_of_three(path)
    path.write_bytes(gzip.compress(path.read_bytes(), mtime=0)[:-40])


def tfrecord_of(path, examples):
    with path.open("wb") as file:
        for example in examples:
            tfrecord.write(file, example)


def examples_of_three():
    for caption in GOOD:
        example = tf_example_pb2.Example()
        example.features.feature["image"].bytes_list.value.append(jpeg())
        example.features.feature["caption"].bytes_list.value.append(caption.encode())
        yield example.SerializeToString()


def torn_tfrecord(path):
    tfrecord_of(path, examples_of_three())
    path.write_bytes(path.read_bytes()[:-5])


def garbled_tfrecord(path):
    first, _, third = examples_of_three()
    tfrecord_of(path, [first, b"\xff\xff no example", third, third])
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)


def corrupt_parquet(path):
    write_parquet(path, GOOD)
    data = bytearray(path.read_bytes())
    metadata = pq.ParquetFile(path).metadata
    column = metadata.row_group(0).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + 8] = b"\xff" * 8
    path.write_bytes(data)


def bad_samples(path):
    pictures = [jpeg()[:-100], b"<!DOCTYPE html>", None, jpeg(), jpeg(), jpeg()]
    captions = [*GOOD, None, "", "the last caption"]
    write_parquet(path, captions, image=pa.array(pictures, pa.binary()))


def bad_members(path):
    members = {
        "0.jpg": jpeg(),  # No caption.
        "1.jpg": jpeg(),
        "1.txt": b"\xff\xfe no text",
        "2.jpg": jpeg(),
        "2.json": b"[no json",
        "3.txt": GOOD[0].encode(),
        "3.jpg": jpeg(),
    }
    write_tar(path, members)


NO_CAPTION = "no caption: none of the fields"
CUT_OFF = "cut off or broken here, the rest is lost: "
# Name -> how the shard is written, the captions that are kept, (record, reason's beginning) of the others.
BROKEN = {
    "truncated.tar": (truncated_tar, GOOD[:2], [("behind 1", CUT_OFF + "unexpected end")]),
    "between.tar": (tar_cut_between_members, GOOD[:2], [("behind 1", CUT_OFF + "no mark of the end")]),
    "garbled.tar": (garbled_tar, GOOD[:1], [("behind 0", CUT_OFF + "garbled header")]),
    "truncated.tar.gz": (
        truncated_tar_gz,
        GOOD[:2],
        [("2", NO_CAPTION), ("behind 2", CUT_OFF + "Compressed file ended")],
    ),
    "torn.tfrecord": (torn_tfrecord, GOOD[:2], [("2", "cut off: the file ends within this record")]),
    "garbled.tfrecord": (
        garbled_tfrecord,
        GOOD[2:] * 2,
        [("0", "garbled: its checksum is wrong"), ("1", "no tf.train.Example")],
    ),
    "corrupt.parquet": (corrupt_parquet, GOOD[2:], [("0 to 1", "row group 0 is broken, 2 rows are lost: ")]),
    "samples.parquet": (
        bad_samples,
        ["the last caption"],
        [("0", "broken"), ("1", "an HTML page"), ("2", "no image: none of the fields"), ("3", NO_CAPTION)],
    ),
    "members.tar": (
        bad_members,
        GOOD[:1],
        [("0", NO_CAPTION), ("1", "the caption isn't UTF-8"), ("2", "2.json: no JSON: ")],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_bad_is_listed_and_what_is_good_kept(name, tmp_path):
    write, captions, expected = BROKEN[name]
    write(tmp_path / name)
    kept, found = converted(tmp_path / name)
    assert [prompt for _, _, prompt in kept] == captions
    assert [record for record, _ in found] == [record for record, _ in expected]
    for (_, reason), (_, beginning) in zip(found, expected, strict=True):
        assert reason.startswith(beginning)
        assert "\n" not in reason


@pytest.mark.parametrize("form", FORMATS)
def test_a_failing_storage_is_not_a_broken_shard(form, web, tmp_path, monkeypatch):
    class Failing(io.BytesIO):
        def read(self, size=-1):
            if self.tell() > 4096:
                raise ConnectionResetError("connection reset")
            return super().read(min(size, 4096))

    (path, *_) = sorted((web / form).iterdir())
    shard = shards.Shard(str(path), path.stat().st_size)
    job = convert.Job(shard, tmp_path / "out", tmp_path / "state.json", convert.Options(), skip_bad=False)
    with monkeypatch.context() as patch:
        file = Failing(path.read_bytes())
        patch.setattr(fsspec, "open", lambda url, mode: fsspec.core.OpenFile(FakeStorage(file), url, mode))
        assert convert.convert(job, lambda number: None) == "connection reset"
    assert convert.read_state(job) is None
    counted = []
    assert convert.convert(job, counted.append) == ""
    assert sum(counted) == shard.size
    assert convert.read_state(job).counts[convert.KEPT] > 5


class FakeStorage(fsspec.AbstractFileSystem):
    """Storage with a single file."""

    def __init__(self, file):
        super().__init__()
        self._file = file

    def open(self, path, mode="rb", **kwargs):
        return self._file


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{8..10}.tar", ["a-8.tar", "a-9.tar", "a-10.tar"]),
        ("{00..01}/{1..2}", ["00/1", "00/2", "01/1", "01/2"]),
        ("{a,b}.tar", ["{a,b}.tar"]),
    ],
)
def test_ranges(pattern, names):
    assert shards.expand_range(pattern) == names


def test_shards_are_found_in_order_and_once(tmp_path):
    for name in ("b.tar", "a.tar", "c.tfrecord-00000-of-00001"):
        (tmp_path / name).write_bytes(b"123")
    (tmp_path / "folder.tar").mkdir()
    found = shards.find([f"{tmp_path}/c*", f"{tmp_path}/*.tar", str(tmp_path / "b.tar")])
    names = ["c.tfrecord-00000-of-00001", "a.tar", "b.tar"]
    assert found == [shards.Shard(str(tmp_path / name), 3) for name in names]


def test_unknown_storage():
    with pytest.raises(errors.UserError, match="nowhere://a.tar: Protocol not known: nowhere"):
        shards.find(["nowhere://a.tar"])
