"""Reads tars of pairs: <key>.<image extension> and <key>.txt, which need not be adjacent."""

import contextlib
import functools
import io
import os
from collections.abc import Collection, Iterator

from richhf_jax import errors, reading
from richhf_jax.inputs import tars
from richhf_jax.inputs.record import (
    IMAGE_EXTENSIONS,
    MAX_TEXT_BYTES,
    Record,
    broken_record,
    checked_prompt,
    printable,
    read_bytes,
)

_GZIP = b"\x1f\x8b"
# Most halves that wait for the other half of their pair.
_MAX_WAITING = 1 << 20


def tar_records(path: str, needs_prompts: bool = True) -> Iterator[Record]:
    """Yields a record for each pair, in the order of the pairs' second halves.

    Then come, in the tar's order, the halves without their other. An image is a record of its own if no
    prompts are needed; any other half is a record that doesn't load. The last is one if the tar is damaged.

    Raises:
      errors.UserError: the tar is compressed.
    """
    waiting: dict[str, tuple[str, tars.Member]] = {}
    problem = ""
    with open(path, "rb", opener=reading.regular) as file:
        if file.peek(len(_GZIP)).startswith(_GZIP):
            raise compressed(path)
        try:
            for key, extension, member in _halves(file):
                other_extension, other = waiting.setdefault(key, (extension, member))
                if other is member:
                    if len(waiting) <= _MAX_WAITING:
                        continue
                    first, (first_extension, first_member) = next(iter(waiting.items()))
                    if needs_prompts or first_extension == ".txt":
                        raise tars.TarError(
                            f"{_MAX_WAITING} files wait for their pair; pack the tar with `tar --sort=name`"
                        )
                    del waiting[first]
                    yield _pair(path, first, first_member, None)
                elif (extension == ".txt") == (other_extension == ".txt"):
                    yield _broken_member(path, key, f"both {other_extension} and {extension} are there")
                else:
                    del waiting[key]
                    image, text = (other, member) if extension == ".txt" else (member, other)
                    yield _pair(path, key, image, text, needs_prompts)
        except tars.TarError as error:
            problem = f"cut off or broken behind the last member found, the rest is lost: {error}"
        twice = _with_both_halves(file, waiting) if waiting else set()
    for key, (extension, member) in waiting.items():
        lacks = f"has no {'image' if extension == '.txt' else '.txt with its prompt'} beside it in the tar"
        why = member.problem or ("is there twice" if key in twice else lacks)
        if member.problem or key in twice or needs_prompts or extension == ".txt":
            yield _broken_member(path, key, f"{key}{extension} {why}")
        else:
            yield _pair(path, key, member, None)
    if problem:
        yield broken_record(f"{os.path.basename(path)}:end", f"{path}: {problem}")


def compressed(path: str) -> errors.UserError:
    """Returns the error for a file that must be unpacked first."""
    return errors.UserError(f"{path}: compressed; unpack it first (`gunzip` for .gz and .tgz)")


def _broken_member(path: str, key: str, problem: str) -> Record:
    return broken_record(key, f"{path}, {key}: {problem}")


def _halves(file: io.BufferedReader) -> Iterator[tuple[str, str, tars.Member]]:
    """Yields key, extension and member of each image and text. Raises tars.TarError."""
    for member in tars.Tar(file):
        folder, slash, name = member.name.rpartition("/")
        stem, extension = os.path.splitext(name)
        extension = extension.lower()
        if extension in (*IMAGE_EXTENSIONS, ".txt"):
            yield f"{folder}{slash}{stem}", extension, member


def _with_both_halves(file: io.BufferedReader, keys: Collection[str]) -> set[str]:
    """Returns those of some keys that have an image and a text in the tar."""
    file.seek(0)
    found: dict[bool, set[str]] = {True: set(), False: set()}
    with contextlib.suppress(tars.TarError):
        for key, extension, _ in _halves(file):
            if key in keys:
                found[extension == ".txt"].add(key)
    return found[True] & found[False]


def _pair(
    path: str, key: str, image: tars.Member, text: tars.Member | None, needs_prompt: bool = False
) -> Record:
    for half in (image, text):
        if half and half.problem:
            return _broken_member(path, key, f"{half.name} {half.problem}")
    return Record(printable(key), functools.partial(_load_pair, path, key, image, text, needs_prompt))


def _load_pair(
    path: str, key: str, image: tars.Member, text: tars.Member | None, needs_prompt: bool
) -> tuple[bytes, str]:
    where, prompt = f"{path}, {key}", ""
    if text:
        data = read_bytes(path, f"{where}.txt", "", text.offset, text.size, MAX_TEXT_BYTES)
        prompt = checked_prompt(data, f"{where}.txt", needs_prompt)
    return read_bytes(path, where, "", image.offset, image.size), prompt
