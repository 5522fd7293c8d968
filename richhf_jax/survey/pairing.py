"""Takes the images of two generators or more into a survey: one image of each generator a prompt.

The survey keeps each image as PNG, upright and with 8 bits a colour, so that neither the format nor the
file's name tells the generator.
"""

import dataclasses
import io
import pathlib
import random
from collections.abc import Iterator, Mapping, Sequence

import tqdm
from PIL import Image

from richhf_jax import errors, inputs, writing
from richhf_jax.annotate import commands, intake
from richhf_jax.foreign_text import for_terminal
from richhf_jax.inputs import images
from richhf_jax.inputs.record import InputError, Record
from richhf_jax.survey import config
from richhf_jax.survey.store import Prompt


@dataclasses.dataclass(frozen=True)
class Found:
    """What the generators have.

    Attributes:
      records: prompt -> generator -> its images; only prompts of which each generator has an image.
      failures: a line for each prompt or image that is left out, and why.
      drawn: the number of prompts of which a generator has several images.
    """

    records: Mapping[str, Mapping[str, Sequence[Record]]]
    failures: list[str]
    drawn: int


def named(given: Sequence[str]) -> dict[str, str]:
    """Returns generator's name -> folder, of "NAME=DIR" or "DIR", whose own name is taken.

    Raises:
      errors.UserError: two generators have the same name, or one has none.
    """
    found: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        # A path may have a "=", too.
        if not equals or "/" in name:
            name, path = pathlib.Path(text).resolve().name, text
        if not name.strip():
            raise errors.UserError(f"{text}: the generator has no name; give NAME=DIR")
        if name in found:
            raise errors.UserError(f"two generators are named {name!r}; give NAME=DIR with other names")
        found[name] = path
    return found


def find(generators: Mapping[str, str]) -> Found:
    """Reads the prompts of the generators' images.

    Args:
      generators: name -> folder or file, as `predict` takes it.

    Raises:
      errors.UserError: one can't be read, or no prompt has an image of each generator.
    """
    failures: list[str] = []
    by_prompt: dict[str, dict[str, list[Record]]] = {}
    for name, path in generators.items():
        given = inputs.Inputs([path])
        for record in tqdm.tqdm(given, f"prompts of {name}", len(given), disable=None, unit=""):
            try:
                _, prompt = record.load()
            except InputError as error:
                failures.append(for_terminal(f"{name}: {record.id}: {error}"))
                continue
            by_prompt.setdefault(prompt, {}).setdefault(name, []).append(record)
    complete = {}
    for prompt, records in by_prompt.items():
        if lacking := [name for name in generators if name not in records]:
            failures.append(for_terminal(f"{prompt!r}: no image of {', '.join(lacking)}"))
        else:
            complete[prompt] = {name: records[name] for name in generators}
    if not complete:
        shown = failures[: commands.SHOWN_FAILURES]
        raise errors.UserError("\n".join([*shown, "no prompt has an image of each generator"]))
    drawn = sum(any(len(found) > 1 for found in records.values()) for records in complete.values())
    return Found(complete, failures, drawn)


def prompts(folder: pathlib.Path, found: Found, count: int | None, seed: int) -> Iterator[Prompt]:
    """Copies images into a survey's folder and yields the prompts.

    Of several images of a prompt the seed draws one. If one can't be decoded, the next is taken.

    Args:
      folder: the survey.
      found: see `find`; its failures get a line for each image that can't be taken.
      count: number of prompts, which the seed draws; None: all.
      seed: seed of what is drawn.
    """
    place = folder / config.IMAGES
    writing.make_folder(place)
    draw = random.Random(seed)
    order = list(found.records)
    if count is not None:
        draw.shuffle(order)
    taken = 0
    for prompt in tqdm.tqdm(order, "images", disable=None, unit=" prompts"):
        if taken == count:
            return
        files = {}
        for name, records in found.records[prompt].items():
            if file := _first_good(place, name, draw.sample(records, len(records)), found.failures):
                files[name] = file
        if len(files) == len(found.records[prompt]):
            taken += 1
            yield Prompt(f"{taken:04}", prompt, files)


def _first_good(
    place: pathlib.Path, generator: str, records: Sequence[Record], failures: list[str]
) -> str | None:
    """Copies the first image that can be decoded. Returns its file's name."""
    for record in records:
        try:
            pixels = images.decode(record.load()[0])
        except (InputError, images.ImageError) as error:
            failures.append(for_terminal(f"{generator}: {record.id}: {error}"))
            continue
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "PNG")
        return intake.keep(place, data.getvalue(), "png")
    return None


def check_differ(found: Sequence[Prompt]) -> None:
    """Checks that no two generators have the same images on all prompts.

    Raises:
      errors.UserError: two have.
    """
    columns: dict[tuple[str, ...], str] = {}
    for name in found[0].files:
        files = tuple(prompt.files[name] for prompt in found)
        if files in columns:
            raise errors.UserError(
                f"{columns[files]} and {name} have the same images on all prompts; name another folder"
            )
        columns[files] = name
