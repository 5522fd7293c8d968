"""Converts an input shard to a TFRecord file of a TFDS data set, without TensorFlow, in many processes."""

import collections
import dataclasses
import io
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from PIL import Image

from richhf_jax import feedback, foreign_text, writing
from richhf_jax.datasets import tfrecord
from richhf_jax.datasets.web_captions import shards
from richhf_jax.inputs import images
from richhf_jax.inputs.record import IMAGE_EXTENSIONS, MAX_TEXT_BYTES

KEPT, BAD = "kept", "bad"
# Most bad samples of a shard that are listed.
_MAX_LISTED = 100_000
# Reasons to leave out a good sample.
FILTERS = TOO_FEW_WORDS, TOO_MANY_WORDS, OTHER_LANGUAGE, TOO_SMALL = (
    "too few words",
    "too many words",
    "other language",
    "too small",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Choice of fields and samples.

    Attributes:
      languages: language codes; 'en' also means 'en-GB'. Empty: all, even samples without a language.
      min_words, max_words: fewest and most words of a caption, separated by white space.
      min_side: fewest pixels of the image's shorter side.
      image_fields, caption_fields, language_fields: possible names; the first that a sample has is taken.
    """

    languages: tuple[str, ...] = ()
    min_words: int = 3
    max_words: int = 64
    min_side: int = 0
    image_fields: tuple[str, ...] = ("image", *(e[1:] for e in IMAGE_EXTENSIONS), "image/encoded")
    caption_fields: tuple[str, ...] = ("caption", "text", "txt", "image/caption")
    language_fields: tuple[str, ...] = ("language", "lang")


@dataclasses.dataclass(frozen=True)
class Job:
    """An input shard and the paths of its output. With `skip_bad`, an unreadable shard becomes empty."""

    shard: shards.Shard
    out: pathlib.Path
    state: pathlib.Path
    options: Options
    skip_bad: bool


@dataclasses.dataclass(frozen=True)
class State:
    """Result of a finished shard, kept in its state file.

    Attributes:
      size: bytes of the input; an input of another size is converted again.
      bytes: bytes of the output.
      counts: KEPT, BAD or one of FILTERS -> number of samples.
      errors: {'file', 'record', 'reason'} of each bad sample.
    """

    size: int
    bytes: int
    counts: Mapping[str, int]
    errors: list[dict[str, str]]


def read_state(job: Job) -> State | None:
    """Reads a job's state; None if it isn't finished, its output is gone, or its input's size has changed."""
    try:
        state = State(**json.loads(job.state.read_text(encoding="utf-8")))
        written = job.out.stat().st_size
    except (FileNotFoundError, ValueError, TypeError):  # A damaged state file counts as none.
        return None
    return state if (state.size, state.bytes) == (job.shard.size, written) else None


def convert(job: Job, count: Callable[[int], object]) -> str:
    """Converts a shard. Output and state appear complete or not at all.

    Args:
      job: the shard and the paths of its output.
      count: called with the number of input bytes, whenever some are read.

    Returns:
      Why the shard can't be read, or ''.

    Raises:
      errors.UserError: the output can't be written.
    """
    with writing.explained_disk_errors(job.out):
        try:
            state = _write(job, _read(job, count))
            if state.counts.keys() == {BAD}:
                first = state.errors[0]
                raise shards.ShardError(
                    f"nothing in it is good; {first['record'] or 'first'}: {first['reason']}"
                )
        except shards.ShardError as error:
            if not job.skip_bad:
                return str(error)
            state = _write(job, iter([shards.Sample("", problem=str(error))]))
        writing.write(job.state, json.dumps(dataclasses.asdict(state)))
    return ""


def _read(job: Job, count: Callable[[int], object]) -> Iterator[shards.Sample]:
    options = job.options
    wanted = {*options.image_fields, *options.caption_fields, *options.language_fields}
    return shards.read(job.shard, wanted, count)


def _write(job: Job, samples: Iterator[shards.Sample]) -> State:
    """Writes the good samples to the job's output."""
    counts, bad = collections.Counter(), []
    shard_name = job.shard.url.rpartition("/")[-1]
    with writing.atomic(job.out) as new, new.open("wb") as file:
        for sample in samples:
            try:
                verdict, image, caption = judge(sample, job.options)
            except ValueError as error:
                verdict = BAD
                reason = " ".join(str(error).split())  # Some messages have several lines.
                if counts[BAD] < _MAX_LISTED:
                    bad.append({"file": job.shard.url, "record": sample.key, "reason": reason})
            if verdict == KEPT:
                values = {
                    feedback.FILENAME_FIELD: f"{shard_name}/{sample.key}",
                    feedback.IMAGE_FIELD: image,
                    feedback.PROMPT_FIELD: caption,
                }
                tfrecord.write(file, tfrecord.serialize_example(values))
            counts[verdict] += 1
        size = file.tell()
    if counts[BAD] > _MAX_LISTED:
        reason = f"{counts[BAD] - _MAX_LISTED} more samples are bad"
        bad.append({"file": job.shard.url, "record": "", "reason": reason})
    return State(size=job.shard.size, bytes=size, counts=dict(counts), errors=bad)


def judge(sample: shards.Sample, options: Options) -> tuple[str, bytes, str]:
    """Decides on a sample: KEPT or the filter that leaves it out; the image's bytes (if KEPT); the caption.

    Raises:
      ValueError: the sample is bad; the message says why.
    """
    if sample.problem:
        raise ValueError(sample.problem)
    text = _text(sample, options.caption_fields, "caption")
    words = [] if foreign_text.is_blank(text) else text.split()
    caption = " ".join(words)
    if len(words) < options.min_words:
        return TOO_FEW_WORDS, b"", caption
    if len(words) > options.max_words:
        return TOO_MANY_WORDS, b"", caption
    if options.languages:
        language = _text(sample, options.language_fields, "language").lower()
        if not any(language == code or language.startswith(f"{code}-") for code in options.languages):
            return OTHER_LANGUAGE, b"", caption
    image = _find(sample, options.image_fields, "image", (bytes, Mapping))
    if isinstance(image, Mapping):  # Hugging Face's struct.
        image = image.get("bytes")
    if not isinstance(image, bytes):
        raise ValueError(f"the image isn't bytes but {type(image).__name__}")
    image = images.checked(image)
    if options.min_side and min(Image.open(io.BytesIO(image)).size) < options.min_side:
        return TOO_SMALL, b"", caption
    return KEPT, image, caption


def _find(sample: shards.Sample, names: tuple[str, ...], what: str, kinds: tuple[type, ...]) -> Any:
    """Returns the first field of these types, else the first field: a path doesn't hide an image's bytes."""
    found = [value for name in names if (value := sample.fields.get(name)) is not None]
    if not found:
        raise ValueError(f"no {what}: none of the fields {', '.join(names)}")
    return next((value for value in found if isinstance(value, kinds)), found[0])


def _text(sample: shards.Sample, names: tuple[str, ...], what: str) -> str:
    """Returns a field's text, which may be bytes in UTF-8. (JSON can hold text that no UTF-8 can.)"""
    value = _find(sample, names, what, (str, bytes))
    if isinstance(value, str | bytes) and len(value) > MAX_TEXT_BYTES:
        raise ValueError(f"the {what} has {len(value)} characters; at most {MAX_TEXT_BYTES} are taken")
    try:
        return (value if isinstance(value, bytes) else value.encode()).decode()
    except (AttributeError, UnicodeError):
        raise ValueError(f"the {what} isn't UTF-8 text") from None
