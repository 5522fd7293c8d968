"""Images by name, alone or in folders, with their prompts in text files beside them."""

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
    """The one image; `prompt` goes before its sidecar."""
    yield Record(printable(os.path.basename(path)), functools.partial(_load_file, path, prompt, None))


def folder_names(root: str, inner: str = "", above: frozenset = frozenset()) -> Iterator[str | Record]:
    """The paths of a folder's images, relative to it, recursively and sorted.

    Args:
      root: the folder that the user named.
      inner: '', or 'a/b/' for the images in root/a/b alone.
      above: the folders that this one is in, by device and inode.

    Yields:
      A path; or, for a folder in `root` that can't be read, a record that doesn't load.

    Raises:
      OSError: `root` can't be read.
    """
    path = os.path.join(root, inner)
    try:
        status = os.stat(path)
        here = (status.st_dev, status.st_ino)
        if here in above:  # A link to a folder that it is in.
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
    """The images of a folder; a sidecar goes before `prompt`.

    Args:
      root: the folder.
      names: as `folder_names` gives them.
      prompt: of images that have no sidecar.
    """
    for name in names:
        if isinstance(name, Record):
            yield name
        else:
            yield Record(
                printable(name), functools.partial(_load_file, os.path.join(root, name), None, prompt)
            )


def _wanted(entry: os.DirEntry) -> str:
    """The name of an image, that of a folder with a slash (paths sort by it), '' for all else."""
    if entry.name.startswith("."):
        return ""
    if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
        return f"{entry.name}/"
    return entry.name if os.path.splitext(entry.name)[1].lower() in IMAGE_EXTENSIONS else ""


def _load_file(path: str, prompt: str | None, fallback: str | None) -> tuple[bytes, str]:
    """An image with `prompt`, or else the sidecar's, or else `fallback`."""
    sidecar = f"{os.path.splitext(path)[0]}.txt"
    if prompt is None and fallback is not None and not os.path.lexists(sidecar):
        prompt = fallback
    if prompt is None:
        prompt = checked_prompt(read_bytes(sidecar, sidecar, _PROMPT_FIX), sidecar)
    return read_bytes(path, path), prompt
