"""Asks a visual question answering model for two attributes of each image, for `datasets.balance`.

The questions are the paper's (section 3.3, where PaLI answers them): is the image photorealistic, and which
of five categories describes it best. IMAGES is

    a folder    of images, as `predict` takes it, searched with its subfolders; the id is the name's stem
    a table     .parquet of Pick-a-Pic (image_0_uid, jpg_0, image_1_uid, jpg_1), or with columns id and image
                (bytes, or Hugging Face's struct); or a folder of such files

OUT.jsonl, the table of attributes, has one line per image:

    {"id": "...", "photorealistic": true, "category": "animal", "answers": {"photorealistic": "yes", ...}}

An attribute is null if the answer is none of the possible ones; `balance` leaves such rows out. "answers"
keeps the answers themselves. After a stop, the same command continues behind the images in OUT.jsonl. Images
that can't be read or decoded, and rows without an id, are listed in OUT.jsonl.errors.jsonl ("id", "reason").

The model is --vqa=transformers:MODEL, any name or folder that transformers' image-text-to-text pipeline takes
(extra `vqa`), or --vqa=MODULE:FUNCTION, a function

    def answer(images: Sequence[PIL.Image.Image], questions: Sequence[str]) -> Sequence[str]

which gets RGB images and one question per image, and returns one answer per image.
"""

import argparse
import dataclasses
import importlib
import itertools
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
import tqdm
from PIL import Image

from richhf_jax import errors, foreign_text, reading, writing
from richhf_jax.inputs import files, row_groups
from richhf_jax.inputs import images as image_files
from richhf_jax.inputs.record import (
    IMAGE_EXTENSIONS,
    InputError,
    checked_id,
    parsed_json,
    read_bytes,
    reason,
)

CATEGORIES = ("human", "animal", "object", "indoor scene", "outdoor scene")
PHOTOREALISTIC_QUESTION = "Is the image photorealistic?"
CATEGORY_QUESTION = (
    "Which category best describes the image? "
    "Choose one in 'human', 'animal', 'object', 'indoor scene', 'outdoor scene'."
)
# (images, one question per image) -> one answer per image.
Vqa = Callable[[Sequence[Image.Image], Sequence[str]], Sequence[str]]

# (column of the id, column of the image).
PICK_A_PIC_COLUMNS = (("image_0_uid", "jpg_0"), ("image_1_uid", "jpg_1"))
PLAIN_COLUMNS = (("id", "image"),)
_ROWS_AT_ONCE = 16
# The answers asked for are words; some models say them in a sentence.
_GENERATE = {"max_new_tokens": 20, "do_sample": False}
_SHOWN = 5

# "An indoor scene", "indoors", "Humans." and so on.
_CATEGORY_WORDS = {category: rf"\b{category.removesuffix(' scene')}s?\b" for category in CATEGORIES}


def parse_photorealistic(answer: str) -> bool | None:
    """Reads yes or no from a free answer; None if it says neither or both.

    >>> parse_photorealistic('Yes, it is.'), parse_photorealistic('no'), parse_photorealistic('a photo')
    (True, False, None)
    """
    words = set(re.findall(r"\w+", answer.lower())) & {"yes", "no"}
    return words == {"yes"} if len(words) == 1 else None


def parse_category(answer: str) -> str | None:
    """Reads the category that a free answer names; None if it names none or several.

    >>> parse_category('An outdoor scene.'), parse_category('Humans'), parse_category('human or animal')
    ('outdoor scene', 'human', None)
    """
    named = [name for name, pattern in _CATEGORY_WORDS.items() if re.search(pattern, answer.lower())]
    return named[0] if len(named) == 1 else None


def load_vqa(name: str) -> Vqa:
    """Returns the function that 'transformers:MODEL' or 'MODULE:FUNCTION' names.

    Raises:
      errors.UserError: there is no such model or function.
    """
    module, _, rest = name.partition(":")
    if not module or not rest or module.startswith("."):
        raise errors.UserError(f"--vqa must be transformers:MODEL or MODULE:FUNCTION, got {name!r}")
    if module == "transformers":
        return transformers_vqa(rest)
    try:
        return getattr(importlib.import_module(module), rest)
    except (ImportError, AttributeError) as error:
        raise errors.UserError(f"--vqa={name}: {error}") from None


def transformers_vqa(model: str) -> Vqa:
    """Loads a model of transformers' image-text-to-text pipeline; it answers one question at a time.

    Models with a chat template get the question as a message of the user, others get the bare question.

    Raises:
      errors.UserError: transformers isn't installed, or there is no such model.
    """
    try:
        from transformers import pipeline
    except ImportError as error:
        raise errors.UserError(f"{error}: pip install 'richhf_jax[vqa]'") from None
    try:
        pipe: Any = pipeline("image-text-to-text", model=model)  # Its annotations lack chats.
    except (OSError, ValueError) as error:
        raise errors.UserError(f"--vqa=transformers:{model}: {error}") from None
    is_chat = getattr(pipe.processor, "chat_template", None) is not None

    def ask_one(image: Image.Image, question: str) -> str:
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        chat = {"text": [{"role": "user", "content": content}]}
        prompt = chat if is_chat else {"images": image, "text": question}
        (answer,) = pipe(**prompt, return_full_text=False, generate_kwargs=_GENERATE)
        return answer["generated_text"]

    return lambda images, questions: [ask_one(*pair) for pair in zip(images, questions, strict=True)]


def read_images(path: pathlib.Path, done: set[str]) -> Iterator[tuple[str, bytes | str]]:
    """Reads images from a folder or parquet files: each id once, without those in `done`.

    Yields:
      The id, and the encoded image or why there is none.

    Raises:
      errors.UserError: there are no images, or a file can't be read or lacks the columns.
    """
    is_table = path.suffix == ".parquet" and path.is_file()
    tables = [path] if is_table else sorted(path.rglob("*.parquet"))
    if tables:
        seen = set()
        for table in tables:
            yield from _read_table(table, done, seen)
    else:
        yield from _read_folder(path, done)


def _read_folder(folder: pathlib.Path, done: set[str]) -> Iterator[tuple[str, bytes | str]]:
    try:
        names = list(files.folder_names(str(folder)))
    except OSError as error:
        raise errors.UserError(f"{folder}: {reason(error)}") from None
    if not names:
        raise errors.UserError(f"{folder}: no {', '.join(IMAGE_EXTENSIONS)} or .parquet file there")
    by_id = {}
    for name in (name for name in names if isinstance(name, str)):
        if (first := by_id.setdefault(pathlib.Path(name).stem, name)) != name:
            raise errors.UserError(
                f"{folder / name}: its id, the name without ending, is also that of {folder / first}"
            )
    yield from ((record.id, _content(record.load)) for record in names if not isinstance(record, str))
    for image_id, name in tqdm.tqdm(by_id.items(), unit=" images", disable=None):
        if image_id not in done:
            path = str(folder / name)
            yield image_id, _content(lambda path=path: read_bytes(path, path))


def _content(load: Callable[[], Any]) -> Any:
    """Returns what a function loads, or why it can't."""
    try:
        return load()
    except InputError as error:
        return str(error)


def _read_table(path: pathlib.Path, done: set[str], seen: set[str]) -> Iterator[tuple[str, bytes | str]]:
    """Reads each row group's ids, and its images if an id is new; adds the ids to `seen`."""
    row = 0
    try:
        with open(path, "rb", opener=reading.regular) as source, pq.ParquetFile(source) as file:
            pairs = _columns(path, file.schema_arrow.names)
            ids = {name: row_groups.exact(file.schema_arrow, name) for name, _ in pairs}
            groups = tqdm.tqdm(range(file.num_row_groups), path.name, unit=" row groups", disable=None)
            for group in groups:
                known = file.read_row_group(group, list(ids)).to_pylist()
                wanted = []
                for number, cells in enumerate(known, row):
                    place = f"{path.name}:{number}"
                    wanted.append([])
                    for name, column in pairs:
                        image_id, problem = _new_id(cells[name], name, ids[name], done, seen)
                        if problem:
                            yield f"{place}:{name}", problem
                        elif image_id:
                            wanted[-1].append((image_id, column))
                row += len(known)
                if any(wanted):
                    yield from _images(file, group, wanted)
    except (OSError, pa.ArrowInvalid) as error:
        raise errors.UserError(f"{path}: {reason(error)}") from None


def _new_id(cell: Any, column: str, exact: int, done: set[str], seen: set[str]) -> tuple[str, str]:
    """Returns a cell's id, '' where its image isn't wanted; and what is wrong with it, or ''."""
    # Tables of attributes have the ids of floats as "7.0" where an earlier version began them.
    is_done = isinstance(cell, float) and str(cell) in done
    try:
        image_id = checked_id(cell, exact)
    except InputError as error:
        return "", "" if is_done else str(error)
    if not image_id:
        return "", f"`{column}` is empty"
    if image_id in seen:
        # An image of Pick-a-Pic is in many rows.
        return "", "" if column != "id" else f"the id {image_id!r} was there before"
    seen.add(image_id)
    return "" if is_done or image_id in done else image_id, ""


def _images(
    file: pq.ParquetFile, group: int, wanted: Sequence[Sequence[tuple[str, str]]]
) -> Iterator[tuple[str, bytes | str]]:
    """Yields id and image, or why there is none, of the pairs (id, column) wanted of each row of a group."""
    columns = sorted({column for row in wanted for _, column in row})
    batches = file.iter_batches(_ROWS_AT_ONCE, [group], columns)
    rows = (fields for batch in batches for fields in batch.to_pylist())
    for row, fields in zip(wanted, rows, strict=True):
        for image_id, column in row:
            image = fields[column]
            data = image.get("bytes") if isinstance(image, dict) else image
            yield image_id, data if isinstance(data, bytes) else f"`{column}` holds no bytes"


def _columns(path: pathlib.Path, names: Sequence[str]) -> Sequence[tuple[str, str]]:
    for pairs in (PICK_A_PIC_COLUMNS, PLAIN_COLUMNS):
        if {name for pair in pairs for name in pair} <= set(names):
            return pairs
    message = f"{path}: has neither Pick-a-Pic's columns nor id and image, only {', '.join(names)}"
    raise errors.UserError(foreign_text.for_terminal(message))


def finished_ids(out: pathlib.Path) -> set[str]:
    """Reads the ids in a table, and removes a last line that a stop cut off from the file.

    Raises:
      errors.UserError: another line is bad.
    """
    if not out.exists():
        return set()
    done, end = set(), 0
    with writing.explained_disk_errors(out, "Name another --out"), out.open("r+b") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                done.add(parsed_json(line)["id"])
            except (ValueError, KeyError, TypeError):
                raise errors.UserError(
                    f"{out}:{number}: this isn't a line of a table of attributes"
                ) from None
            end += len(line)
        file.truncate(end)
    return done


def ask(vqa: Vqa, ids: Sequence[str], images: Sequence[Image.Image]) -> list[dict]:
    """Asks both questions about some images and returns the table's rows.

    Raises:
      errors.UserError: the model doesn't return one string per question.
    """
    count = len(ids)
    questions = [PHOTOREALISTIC_QUESTION] * count + [CATEGORY_QUESTION] * count
    answers = list(vqa([*images, *images], questions))
    if len(answers) != len(questions) or not all(isinstance(answer, str) for answer in answers):
        raise errors.UserError(
            f"--vqa: {len(questions)} questions need as many strings, got {answers!r:.200}"
        )
    return [
        {
            "id": image_id,
            "photorealistic": parse_photorealistic(real),
            "category": parse_category(category),
            "answers": {"photorealistic": real, "category": category},
        }
        for image_id, real, category in zip(ids, answers[:count], answers[count:], strict=True)
    ]


@dataclasses.dataclass
class Report:
    """Counts of a run.

    Attributes:
      rows: rows added to the table.
      unknown: those of them that lack an attribute.
      first_unknown: the first few of these rows.
      undecodable: images that can't be decoded.
    """

    rows: int = 0
    unknown: int = 0
    first_unknown: list[dict] = dataclasses.field(default_factory=list)
    undecodable: int = 0

    def add(self, rows: Sequence[dict]) -> None:
        """Counts rows that were added to the table."""
        unknown = [row for row in rows if None in (row["photorealistic"], row["category"])]
        self.rows += len(rows)
        self.unknown += len(unknown)
        self.first_unknown = (self.first_unknown + unknown)[:_SHOWN]


def make_table(
    images: Iterable[tuple[str, bytes | str]], out: pathlib.Path, vqa: Vqa, batch_size: int = 8
) -> Report:
    """Asks about images and appends to the table, batch by batch; a stop loses the last batch at most.

    Args:
      images: ids and encoded images that aren't in the table; see `read_images`.
      out: the table.
      vqa: the model.
      batch_size: number of images that the model gets at once.

    Raises:
      errors.UserError: see `ask`; or a file can't be read or written.
    """
    report = Report()
    errors_path = errors_of(out)
    with writing.explained_disk_errors(out, f"What is written stays. {writing.FIX}"):
        # Images that failed before are tried again, so the list has only this run's.
        with out.open("a", encoding="utf-8") as table, errors_path.open("w", encoding="utf-8") as failures:
            good = _decoded(images, failures, report)
            while batch := list(itertools.islice(good, batch_size)):
                ids, pictures = zip(*batch, strict=True)
                rows = ask(vqa, ids, pictures)
                table.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
                table.flush()
                os.fsync(table.fileno())
                report.add(rows)
        if not report.undecodable:
            errors_path.unlink()
    return report


def errors_of(out: pathlib.Path) -> pathlib.Path:
    """Returns the path of the list of a table's undecodable images."""
    return out.with_name(f"{out.name}.errors.jsonl")


def _decoded(
    images: Iterable[tuple[str, bytes | str]], failures: TextIO, report: Report
) -> Iterator[tuple[str, Image.Image]]:
    """Yields upright RGB images; writes those that can't be decoded to `failures` instead."""
    for image_id, data in images:
        try:
            if isinstance(data, str):
                raise InputError(data)
            yield image_id, Image.fromarray(image_files.decode(data))
        except (InputError, image_files.ImageError) as error:
            failures.write(json.dumps({"id": image_id, "reason": str(error)}) + "\n")
            report.undecodable += 1


@errors.command()
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m richhf_jax.datasets.attributes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", required=True, type=pathlib.Path, metavar="IMAGES", help="see above")
    parser.add_argument(
        "--out", required=True, type=pathlib.Path, metavar="OUT.jsonl", help="continued if it exists"
    )
    parser.add_argument("--vqa", required=True, metavar="MODEL", help="see above")
    parser.add_argument(
        "--batch_size", type=int, default=8, metavar="N", help="images the model gets at once; default: 8"
    )
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        parser.error("--batch_size must be at least 1")
    vqa = load_vqa(options.vqa)
    done = finished_ids(options.out)
    report = make_table(read_images(options.images, done), options.out, vqa, options.batch_size)
    for row in report.first_unknown:
        text = foreign_text.for_terminal(json.dumps(row, ensure_ascii=False))
        print(f"no attribute: {text}", file=sys.stderr)
    where = f", see {errors_of(options.out)}" if report.undecodable else ""
    print(
        f"{options.out}: {len(done):,} images were there, {report.rows:,} added; {report.unknown:,} of these"
        f" lack an attribute; {report.undecodable:,} can't be decoded{where}"
    )


if __name__ == "__main__":
    main()
