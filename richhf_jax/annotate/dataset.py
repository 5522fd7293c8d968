"""Writes the answers of a project as the files from which `datasets.rich_hf_18k` builds a data set.

    OUT/train.tfrecord, dev.tfrecord, test.tfrecord   consolidated records, as the published labels
    OUT/images/UID.png, ...                           the images
    OUT/prompts.jsonl                                 a line an image: uid, prompt, image (its path), id (its
                                                      name in the project); also an INPUT of `predict`

Other people's names never become paths, so a uid is made of the name's hash. An image's split follows from
its prompt's words alone: images of one prompt are in one split, and stay there when the project grows.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence

from richhf_jax import errors, feedback, writing
from richhf_jax.annotate import project, transfer
from richhf_jax.annotate.records import Item
from richhf_jax.annotate.store import Store
from richhf_jax.datasets import consolidate, ratings

IMAGES, PROMPTS = "images", "prompts.jsonl"
# Split -> its share of the prompts, in percent.
SPLITS = {"train": 80, "dev": 10, "test": 10}

Rated = tuple[Item, Sequence[ratings.Rating]]


def write(store: Store, folder: pathlib.Path, first: bool = False) -> dict[str, int]:
    """Writes the files to a folder; `first` as in `transfer.counted`. Returns each split's number of images.

    Raises:
      errors.UserError: the project doesn't ask all that the records have, a split would be empty, or an image
        isn't as it was annotated.
    """
    items = {item.id: item for item in store.items()}
    splits: dict[str, list[Rated]] = {split: [] for split in SPLITS}
    for given in consolidate.group_by_image(transfer.counted_ratings(store, first=first)):
        item = items[given[0].image_id]
        splits[split_of(item.prompt)].append((item, given))
    sizes = {split: len(rated) for split, rated in splits.items()}
    if not all(sizes.values()):
        found = ", ".join(f"{size} {split}" for split, size in sizes.items())
        raise errors.UserError(
            f"{store.folder}: a split would be empty ({found}). Images are split by their prompts: one in"
            " ten is in dev, and one in ten in test. Annotate images of more prompts"
        )
    writing.make_folder(folder / IMAGES)
    for split, rated in splits.items():
        consolidate.write_tfrecord(_records(split, rated), folder / f"{split}.tfrecord")
        for item, _ in rated:
            (folder / IMAGES / _file(item)).write_bytes(project.read_image(store.image_path(item)))
    lines = (_prompt_line(item) for rated in splits.values() for item, _ in rated)
    writing.write(folder / PROMPTS, "".join(lines))
    return sizes


def split_of(prompt: str) -> str:
    """Returns the split of a prompt's images. Prompts of the same words have the same."""
    words = " ".join(feedback.tokenize_prompt(prompt)).casefold()
    place = int.from_bytes(hashlib.sha256(words.encode()).digest()[:8]) * 100 >> 64
    for split, share in SPLITS.items():
        if place < share:
            return split
        place -= share
    raise AssertionError("the shares are 100 percent")


def _records(split: str, rated: Sequence[Rated]) -> Iterator[dict[str, str | float | bytes]]:
    for item, given in rated:
        yield consolidate.consolidate(given) | {feedback.FILENAME_FIELD: f"{split}/{_file(item)}"}


def _file(item: Item) -> str:
    return f"{_uid(item)}{pathlib.PurePath(item.file).suffix}"


def _uid(item: Item) -> str:
    return hashlib.sha256(item.id.encode()).hexdigest()[:32]


def _prompt_line(item: Item) -> str:
    image = f"{IMAGES}/{_file(item)}"
    fields = {"uid": _uid(item), feedback.PROMPT_FIELD: item.prompt, "image": image, "id": item.id}
    return json.dumps(fields, ensure_ascii=False) + "\n"
