"""Reads single images and folders of images, with their prompts in text files (sidecars) beside them."""

import functools
import os
from collections.abc import Iterable, Iterator

from richhf_jax.inputs.record import (
    IMAGE_EXTENSIONS,
    Record,
    broken_record,
    checked_prompt,
    printable,
    read_bytes,
)

_PROMPT_FIX = "the image needs a prompt: write it into this file, or give --prompt"


def image_records(path: str, prompt: str | None) -> Iterator[Record]:
    """Yields the record of one image. `prompt` is taken, or else the sidecar."""
    yield Record(printable(os.path.basename(path)), functools.partial(_load_file, path, prompt, None))


def folder_names(root: str, inner: str = "", above: frozenset = frozenset()) -> Iterator[str | Record]:
    """Yields the paths of a folder's images, relative to it, recursively and sorted.

    Args:
      root: the folder that the user named.
      inner: '' for all images; 'a/b/' for only the images in root/a/b.
      above: the folders that contain this one, as (device, inode).

    Yields:
      A path; or, for a folder in `root` that can't be read, a record that doesn't load.

    Raises:
      OSError: `root` can't be read.
    """
    path = os.path.join(root, inner)
    try:
        status = os.stat(path)
        here = (status.st_dev, status.st_ino)
        if here in above:  # A link to a folder that contains it.
            return
        with os.scandir(path) as entries:
            names = sorted(name for entry in entries if (name := _wanted(entry)))
    except OSError as error:
        if not inner:
            raise
        yield broken_record(inner, f"{path}: {error.strerror or error}")
        return
    for name in names:
        if name.endswith("/"):
            yield from folder_names(root, inner + name, above | {here})
        else:
            yield inner + name


def folder_records(root: str, names: Iterable[str | Record], prompt: str | None) -> Iterator[Record]:
    """Yields the records of a folder's images. The sidecar is taken, or else `prompt`.

    Args:
      root: the folder.
      names: the results of `folder_names`.
      prompt: the prompt of images that have no sidecar; None: these don't load.
    """
    for name in names:
        if isinstance(name, Record):
            yield name
        else:
            yield Record(
                printable(name), functools.partial(_load_file, os.path.join(root, name), None, prompt)
            )


def _wanted(entry: os.DirEntry) -> str:
    """Returns the name of an image, the name of a folder with "/" added (for sorting), '' for others."""
    if entry.name.startswith("."):
        return ""
    if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
        return f"{entry.name}/"
    return entry.name if os.path.splitext(entry.name)[1].lower() in IMAGE_EXTENSIONS else ""


def _load_file(path: str, prompt: str | None, fallback: str | None) -> tuple[bytes, str]:
    """Returns an image with `prompt`, or else the sidecar's prompt, or else `fallback`."""
    sidecar = f"{os.path.splitext(path)[0]}.txt"
    if prompt is None and fallback is not None and not os.path.lexists(sidecar):
        prompt = fallback
    if prompt is None:
        prompt = checked_prompt(read_bytes(sidecar, sidecar, _PROMPT_FIX), sidecar)
    return read_bytes(path, path), prompt
