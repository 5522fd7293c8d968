"""Writes small files in the form of every real source, to try the build commands without the real data.

Pictures are procedural scenes, and simulated raters label them (`scenes`, `raters`, `consolidate`). Schemas
and file names are those of the published data.

    DIR/raw/{train,dev,test}.jsonl          raw ratings, three raters per image (`ratings`)
    DIR/labels/{train,dev,test}.tfrecord    RichHF-18K: the raw ratings consolidated
    DIR/pick_a_pic/data/*.parquet           Pick-a-Pic v1: pairs of images; half of the rows have no image of
                                            RichHF-18K, and some images are in several rows
    DIR/joined/*.parquet                    labels, image and prompt in one table
    DIR/images/<uid>.{jpg,png,webp}         images as files
    DIR/prompts.csv, DIR/prompts.jsonl      their prompts (uid, prompt), the same in two formats
    DIR/web/{tfrecord,webdataset,parquet}/  images with captions in two languages, three files each; a few
                                            captions are too short or too long

Equal arguments give equal files, byte by byte (with the same versions of Pillow and pyarrow).
"""

import argparse
import csv
import dataclasses
import datetime
import hashlib
import io
import json
import os
import pathlib
import sys
import tarfile
import uuid
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from richhf_jax import errors, feedback, writing
from richhf_jax.datasets import consolidate, raters, scenes

MIN_EXAMPLES = 6
JPEG_QUALITY = 95

# RichHF-18K's split -> the split of the scenes' prompts; and the split of Pick-a-Pic that has its images.
SCENE_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
PICK_A_PIC_SPLITS = {"train": "train", "dev": "train", "test": "test"}

# https://huggingface.co/datasets/yuvalkirstain/pickapic_v1
PICK_A_PIC_SCHEMA = pa.schema(
    {
        "are_different": pa.bool_(),
        "best_image_uid": pa.string(),
        "caption": pa.string(),
        "created_at": pa.timestamp("ns"),
        "has_label": pa.bool_(),
        "image_0_uid": pa.string(),
        "image_0_url": pa.string(),
        "image_1_uid": pa.string(),
        "image_1_url": pa.string(),
        "jpg_0": pa.binary(),
        "jpg_1": pa.binary(),
        "label_0": pa.float64(),
        "label_1": pa.float64(),
        "model_0": pa.string(),
        "model_1": pa.string(),
        "ranking_id": pa.int64(),
        "user_id": pa.int64(),
        "num_example_per_prompt": pa.int64(),
        "__index_level_0__": pa.int64(),
    }
)
ROWS_IN_A_GROUP = 4
PICK_A_PIC_SHARDS = {"train": 3, "test": 2}
_FIRST_RANKING = datetime.datetime(2023, 2, 1)

# How the Hugging Face library stores an image in parquet.
HF_IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
JOINED_SCHEMA = pa.schema(
    {
        feedback.FILENAME_FIELD: pa.string(),
        feedback.IMAGE_FIELD: HF_IMAGE,
        feedback.PROMPT_FIELD: pa.string(),
        **{field: pa.float32() for field in feedback.SCORE_FIELDS.values()},
        **dict.fromkeys(feedback.HEATMAP_FIELDS.values(), HF_IMAGE),
        feedback.KEYWORDS_FIELD: pa.string(),
    }
)

WEB_SCHEMA = pa.schema({"image": pa.binary(), "caption": pa.string(), "language": pa.string()})
WEB_SHARDS = 3


@dataclasses.dataclass(frozen=True)
class Sample:
    """One image of RichHF-18K.

    Attributes:
      split: 'train', 'dev' or 'test'.
      uid: Pick-a-Pic's id of the image.
      prompt: what the picture was to show.
      image: the encoded image.
      extension: file extension of the image's format, e.g. 'jpg'.
      raw_lines: the raters' answers as JSON.
      record: RichHF-18K's eight fields, consolidated from `raw_lines`.
    """

    split: str
    uid: str
    prompt: str
    image: bytes
    extension: str
    raw_lines: tuple[str, ...]
    record: dict[str, str | float | bytes]


def make_uid(name: str) -> str:
    """Makes a UUID from a name; equal names give equal UUIDs."""
    return str(uuid.UUID(bytes=hashlib.sha256(name.encode()).digest()[:16], version=4))


def punctuate(prompt: str) -> str:
    """Adds a comma and quotes, which CSV must escape; the tokens stay the same.

    >>> punctuate('a red star')
    'a red, "star"'
    """
    start, _, last = prompt.rpartition(" ")
    return f'{start}, "{last}"'


def encode(image: np.ndarray, extension: str) -> bytes:
    """Encodes uint8 [height, width, 3] in the format 'jpg', 'png' or 'webp'."""
    buffer = io.BytesIO()
    image_format = Image.registered_extensions()[f".{extension}"]
    Image.fromarray(image).save(buffer, image_format, quality=JPEG_QUALITY)
    return buffer.getvalue()


def make_samples(examples: int = 24, image_size: int = 64) -> list[Sample]:
    """Makes images of all splits, train first: two thirds are train; dev and test share the rest.

    Most are JPEG; some are PNG and WebP. Some prompts have commas and quotes.

    Args:
      examples: number of images in all splits, at least 6.
      image_size: side in pixels, 64 to 512.

    Raises:
      ValueError: `examples` or `image_size` is out of range.
    """
    if examples < MIN_EXAMPLES:
        raise ValueError(f"examples must be at least {MIN_EXAMPLES}, got {examples}")
    config = scenes.SceneConfig(image_size=image_size)
    dev = test = examples // 6
    counts = {"train": examples - dev - test, "dev": dev, "test": test}
    return [_make_sample(config, split, index) for split, count in counts.items() for index in range(count)]


def _make_sample(config: scenes.SceneConfig, split: str, index: int) -> Sample:
    scene_name = scenes.filename(SCENE_SPLITS[split], index)
    uid = make_uid(f"{split}/{index}")
    filename = f"{split}/{uid}.png"
    image, truth = scenes.render(config, scene_name)
    prompt = truth.scene.description.prompt
    if index % 4 == 1:
        prompt = punctuate(prompt)
    answers = [
        dataclasses.replace(raters.rate(config, scene_name, truth, rater), image_id=filename, prompt=prompt)
        for rater in raters.LEANINGS
    ]
    extension = ("jpg", "jpg", "png", "jpg", "webp")[index % 5]
    return Sample(
        split=split,
        uid=uid,
        prompt=prompt,
        image=encode(image, extension),
        extension=extension,
        raw_lines=tuple(answer.to_json() for answer in answers),
        record=consolidate.consolidate(answers),
    )


def _by_split(samples: Sequence[Sample], splits: dict[str, str]) -> Iterator[tuple[str, list[Sample]]]:
    """Groups samples by the value of `splits` for their split."""
    for split in dict.fromkeys(splits.values()):
        yield split, [sample for sample in samples if splits[sample.split] == split]


_OWN_SPLITS = {split: split for split in SCENE_SPLITS}


def write_raw(folder: pathlib.Path, samples: Sequence[Sample]) -> None:
    """Writes raw ratings, {train,dev,test}.jsonl, rater by rater, so that an image's lines are apart."""
    folder.mkdir(parents=True)
    for split, group in _by_split(samples, _OWN_SPLITS):
        lines = [line for by_rater in zip(*(s.raw_lines for s in group), strict=True) for line in by_rater]
        (folder / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")


def write_labels(folder: pathlib.Path, samples: Sequence[Sample]) -> None:
    """Writes RichHF-18K's files, {train,dev,test}.tfrecord."""
    folder.mkdir(parents=True)
    for split, group in _by_split(samples, _OWN_SPLITS):
        consolidate.write_tfrecord((sample.record for sample in group), folder / f"{split}.tfrecord")


def write_pick_a_pic(folder: pathlib.Path, samples: Sequence[Sample]) -> None:
    """Writes shards of Pick-a-Pic v1: rows with the samples' images, and as many rows without.

    Every third image is in a second row, often in another shard. Row groups have few rows.
    """
    folder.mkdir(parents=True)
    for split, group in _by_split(samples, PICK_A_PIC_SPLITS):
        rows = _pick_a_pic_rows(split, group)
        shards = PICK_A_PIC_SHARDS[split]
        for number in range(shards):
            table = pa.Table.from_pylist(rows[number::shards], PICK_A_PIC_SCHEMA)
            name = f"{split}-{number:05}-of-{shards:05}"
            digest = hashlib.sha256(name.encode()).hexdigest()[:16]
            pq.write_table(table, folder / f"{name}-{digest}.parquet", row_group_size=ROWS_IN_A_GROUP)


def _pick_a_pic_rows(split: str, samples: Sequence[Sample]) -> list[dict]:
    """Makes the rows of all shards: samples beside other images, some twice; and other images only."""
    others = [(make_uid(f"other/{split}/{n}"), _other_image(n)) for n in range(4)]
    rng = np.random.default_rng(0)
    pairs = []
    for index, sample in enumerate(samples):
        image = (sample.uid, sample.image)
        for _ in range(2 if index % 3 == 0 else 1):
            pair = [image, others[rng.integers(len(others))]]
            pairs.append((sample.prompt, pair[:: rng.choice((-1, 1))]))
    for index in range(len(pairs)):
        pick = rng.permutation(len(others))[:2]
        pairs.append((f"another prompt, number {index}", [others[i] for i in pick]))
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    return [_pick_a_pic_row(index, caption, *pair) for index, (caption, pair) in enumerate(pairs)]


def _other_image(number: int) -> bytes:
    """Makes a small picture that isn't in RichHF-18K."""
    shade = np.full((32, 48, 3), (60 * number, 128, 255 - 60 * number), np.uint8)
    return encode(shade, "jpg")


def _pick_a_pic_row(index: int, caption: str, first: tuple[str, bytes], second: tuple[str, bytes]) -> dict:
    row = {
        "are_different": True,
        "best_image_uid": (first, second)[index % 2][0],
        "caption": caption,
        "created_at": _FIRST_RANKING + datetime.timedelta(minutes=index),
        "has_label": True,
        "ranking_id": 1000 + index,
        "user_id": index % 7,
        "num_example_per_prompt": 1,
        "__index_level_0__": index,
    }
    for side, (uid, image) in enumerate((first, second)):
        row |= {
            f"image_{side}_uid": uid,
            f"image_{side}_url": f"https://example.com/images/{uid}.png",
            f"jpg_{side}": image,
            f"label_{side}": float(index % 2 == side),
            f"model_{side}": "stabilityai/stable-diffusion-2-1",
        }
    return row


def write_joined(folder: pathlib.Path, samples: Sequence[Sample]) -> None:
    """Writes {train,dev,test}-00000-of-00001.parquet, images and heatmaps as Hugging Face's structs."""
    folder.mkdir(parents=True)
    for split, group in _by_split(samples, _OWN_SPLITS):
        table = pa.Table.from_pylist([_joined_row(sample) for sample in group], JOINED_SCHEMA)
        path = folder / f"{split}-00000-of-00001.parquet"
        pq.write_table(table, path, row_group_size=ROWS_IN_A_GROUP)


def _joined_row(sample: Sample) -> dict:
    maps = {field: {"bytes": sample.record[field]} for field in feedback.HEATMAP_FIELDS.values()}
    image = {"bytes": sample.image, "path": f"{sample.uid}.{sample.extension}"}
    return {
        **sample.record,
        **maps,
        feedback.IMAGE_FIELD: image,
        feedback.PROMPT_FIELD: sample.prompt,
    }


def write_images(folder: pathlib.Path, samples: Sequence[Sample]) -> None:
    """Writes images/<uid>.{jpg,png,webp}, prompts.csv and prompts.jsonl into the folder."""
    (folder / "images").mkdir(parents=True)
    for sample in samples:
        (folder / "images" / f"{sample.uid}.{sample.extension}").write_bytes(sample.image)
    rows = [{"uid": sample.uid, "prompt": sample.prompt} for sample in samples]
    with (folder / "prompts.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["uid", "prompt"])
        writer.writeheader()
        writer.writerows(rows)
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")


def make_web_pairs(examples: int = 24, image_size: int = 64) -> list[dict[str, str | bytes]]:
    """Makes clean pictures with captions: JPEG `image`, `caption`, `language` ('en', sometimes 'de').

    In each ten captions, one is a single word and one has hundreds.
    """
    config = scenes.SceneConfig(image_size=image_size, clean=True)
    pairs = []
    for index in range(examples):
        image, truth = scenes.render(config, scenes.filename("train", index))
        caption, language = truth.scene.description.prompt, "en"
        if index % 10 == 4:
            caption = truth.objects[0].shape
        elif index % 10 == 9:
            caption = " ".join([caption] * 100)
        elif index % 4 == 3:
            caption, language = f"ein Bild mit Formen, {len(truth.objects)} an der Zahl", "de"
        pairs.append({"image": encode(image, "jpg"), "caption": caption, "language": language})
    return pairs


def write_web(folder: pathlib.Path, pairs: Sequence[dict[str, str | bytes]]) -> None:
    """Writes pairs of image and caption in three forms, three files each.

    tfrecord/ and parquet/ have `image`, `caption` and `language`; webdataset/ has <key>.jpg, <key>.txt and
    <key>.json, an object with `language`.
    """
    for form in ("tfrecord", "webdataset", "parquet"):
        (folder / form).mkdir(parents=True)
    for number in range(WEB_SHARDS):
        name = f"captions-{number:05}-of-{WEB_SHARDS:05}"
        shard = pairs[number::WEB_SHARDS]
        consolidate.write_tfrecord(shard, folder / "tfrecord" / f"{name}.tfrecord")
        table = pa.Table.from_pylist(list(shard), WEB_SCHEMA)
        pq.write_table(table, folder / "parquet" / f"{name}.parquet", row_group_size=ROWS_IN_A_GROUP)
        with tarfile.open(folder / "webdataset" / f"{name}.tar", "w") as tar:
            for index, pair in enumerate(shard):
                members = {
                    "jpg": pair["image"],
                    "txt": str(pair["caption"]).encode(),
                    "json": json.dumps({"language": pair["language"]}).encode(),
                }
                for extension, data in members.items():
                    member = tarfile.TarInfo(f"{number:03}{index:06}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def write(out: pathlib.Path, examples: int = 24, image_size: int = 64) -> None:
    """Writes every source into the folder `out`, which appears complete or not at all.

    Raises:
      errors.UserError: `out` isn't empty or can't be written, or a number is out of range.
    """
    try:
        samples = make_samples(examples, image_size)
    except ValueError as error:
        raise errors.UserError(f"{error}. Nothing written.") from None
    nothing = f"Nothing written. {writing.FIX}"
    with writing.explained_disk_errors(out, nothing), writing.new_directory(out, "--out") as folder:
        write_raw(folder / "raw", samples)
        write_labels(folder / "labels", samples)
        write_pick_a_pic(folder / "pick_a_pic/data", samples)
        write_joined(folder / "joined", samples)
        write_images(folder, samples)
        write_web(folder / "web", make_web_pairs(examples, image_size))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m richhf_jax.datasets.sample_sources",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", required=True, type=pathlib.Path, metavar="DIR", help="a new or empty folder"
    )
    parser.add_argument(
        "--examples", type=int, default=24, metavar="N", help="images of RichHF-18K, at least 6; default: 24"
    )
    parser.add_argument(
        "--image_size", type=int, default=64, metavar="PIXELS", help="side, 64 to 512; default: 64"
    )
    options = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # Nothing here concerns a GPU.
    try:
        write(options.out, options.examples, options.image_size)
    except errors.UserError as error:
        sys.exit(str(error))
    print(f"{options.out}: {options.examples} images of {options.image_size} pixels in every source's form")


if __name__ == "__main__":
    main()
