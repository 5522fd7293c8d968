"""Takes images, gold answers and an order into a project, as people have them.

Images are those that `predict` takes. The project keeps a copy of each as `inputs.images.checked` gives it:
upright, 8 bits a colour, one frame, without metadata, in a format that browsers show. So a browser,
TensorFlow and the predictor count the same pixels. A file that is so already may be linked instead.
"""

import contextlib
import csv
import os
import pathlib
from collections.abc import Iterator

import tqdm

from richhf_jax import errors, feedback, inputs, reading, writing
from richhf_jax.annotate import answers, project
from richhf_jax.annotate.records import Item
from richhf_jax.datasets import ratings
from richhf_jax.foreign_text import for_terminal
from richhf_jax.inputs import containers, images
from richhf_jax.inputs.record import InputError, Record, bounded_lines


def items(
    folder: pathlib.Path,
    given: inputs.Inputs,
    gold: dict[str, ratings.Rating],
    failures: list[str],
    link: bool = False,
) -> Iterator[Item]:
    """Copies images into a project's folder and yields their items.

    Args:
      folder: the project.
      given: images with prompts.
      gold: image's name -> its right answer.
      failures: gets a line for each image that can't be taken, and why.
      link: whether to link the files that a copy would equal.
    """
    writing.make_folder(folder / project.IMAGES)
    seen: set[str] = set()
    for record in tqdm.tqdm(given, "images", len(given), disable=None, unit=""):
        try:
            if record.id in seen:
                raise InputError("an image of this name was there before; give it another id")
            seen.add(record.id)
            yield _item(folder, record, gold.get(record.id), link)
        except (InputError, images.ImageError) as error:
            failures.append(f"{for_terminal(record.id)}: {for_terminal(str(error))}")


def _item(folder: pathlib.Path, record: Record, gold: ratings.Rating | None, link: bool) -> Item:
    found, prompt = record.load()
    if record.id in (".", "..") or "\n" in record.id:
        raise InputError("browsers can't ask for an image of this id: give another id")
    if not feedback.tokenize_prompt(prompt):
        raise InputError("the prompt has no words")
    data = images.checked(found)
    container = containers.read(data)
    if gold and (gold.prompt, gold.width, gold.height) != (prompt, container.width, container.height):
        raise InputError("its gold answer is for another prompt or size")
    target = record.path if link and found == data else ""
    name = keep(folder / project.IMAGES, data, container.format, target)
    right = answers.of_rating(gold) if gold else None
    return Item(record.id, prompt, name, container.width, container.height, right)


def keep(folder: pathlib.Path, data: bytes, form: str, target: str = "") -> str:
    """Keeps an image in a folder; a link that is there is made anew or becomes a copy.

    Args:
      folder: the folder.
      data: the image's bytes.
      form: its format, such as "PNG".
      target: the file with these bytes that is to be linked; '' copies them.

    Returns:
      The file's name.
    """
    # Named by the content: other people's names never become paths.
    place = folder / f"{project.content_name(data)}.{form.lower()}"
    if place.exists() and not place.is_symlink():
        return place.name
    if target:
        new = place.with_name(f".{place.name}.new")
        new.unlink(missing_ok=True)
        new.symlink_to(os.path.realpath(target))
        writing.move(new, place)
    else:
        place.unlink(missing_ok=True)  # Through a link, `write` would change the file that it leads to.
        writing.write(place, data)
    return place.name


def read_gold(path: str) -> dict[str, ratings.Rating]:
    """Reads right answers from a file of raw ratings, one an image.

    Raises:
      errors.UserError: a line is bad, or an image has two answers.
    """
    gold: dict[str, ratings.Rating] = {}
    with _explained(path), open(path, "rb", opener=reading.regular) as file:
        for number, rating in ratings.read_ratings(bounded_lines(file)):
            if isinstance(rating, ratings.RatingError):
                raise errors.UserError(f"{path}:{number}: {rating}")
            if rating.image_id in gold:
                raise errors.UserError(f"{path}:{number}: {rating.image_id!r} has a gold answer already")
            gold[rating.image_id] = rating
    if not gold:
        raise errors.UserError(f"{path}: no gold answer in it")
    return gold


def read_order(path: str) -> list[str]:
    """Reads the names of images from a CSV with a column `image`, such as predict's order.csv.

    Raises:
      errors.UserError: it has no such column, or can't be read.
    """
    with _explained(path), open(path, encoding="utf-8-sig", newline="", opener=reading.regular) as file:
        rows = csv.DictReader(file)
        try:
            if "image" not in (rows.fieldnames or ()):
                raise errors.UserError(f"{path}: no column `image`; give the order.csv of predict")
            return list(dict.fromkeys(row["image"] for row in rows))
        except (csv.Error, UnicodeDecodeError) as error:
            raise errors.UserError(f"{path}: broken CSV: {error}") from None


def _explained(path: str) -> contextlib.AbstractContextManager[None]:
    return writing.explained_disk_errors(os.path.abspath(path), "Name a file that can be read")
