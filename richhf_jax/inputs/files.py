"""Reads single images and folders of images, with their prompts in text files (sidecars) beside them."""

import functools
import itertools
import os
import unicodedata
from collections.abc import Iterable, Iterator

from richhf_jax.inputs.record import (
    IMAGE_EXTENSIONS,
    MAX_TEXT_BYTES,
    OTHER_IMAGE_EXTENSIONS,
    InputError,
    Record,
    broken_record,
    checked_prompt,
    printable,
    read_bytes,
    reason,
    unsupported_image,
)

_PROMPT_FIX = "the image needs a prompt: write it into this file, or give --prompt"
# .txt, .TXT, .Txt and so on.
_TEXT_EXTENSIONS = tuple(f".{''.join(letters)}" for letters in itertools.product("tT", "xX", "tT"))


def image_records(path: str, prompt: str | None, needs_prompt: bool = True) -> Iterator[Record]:
    """Yields the record of one image. `prompt` is taken, or else the sidecar."""
    load = functools.partial(_load_file, path, prompt, None, needs_prompt)
    yield Record(printable(os.path.basename(path)), load, path=path)


def folder_names(root: str, inner: str = "", above: frozenset = frozenset()) -> Iterator[str | Record]:
    """Yields the paths of a folder's images, relative to it, recursively and sorted.

    Args:
      root: the folder that the user named.
      inner: '' for all images; 'a/b/' for only the images in root/a/b.
      above: the folders that contain this one, as (device, inode).

    Yields:
      A path; or a record that doesn't load, for a folder in `root` that can't be read, a picture of a kind
      that isn't decoded, a hidden image with a sidecar, and an image whose sidecar has almost its name.

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
        yield broken_record(inner, f"{path}: {reason(error)}")
        return
    texts = {stem for stem, extension in map(_split, names) if extension == ".txt"}
    # Texts that belong to no image, by a key that is the same for names that look the same.
    lonely = texts - {
        stem for stem, extension in map(_split, names) if texts and extension in IMAGE_EXTENSIONS
    }
    alike = {_folded(stem): stem for stem in lonely}
    for name in names:
        stem, extension = _split(name)
        if name.endswith("/"):
            yield from folder_names(root, inner + name, above | {here})
        elif name.startswith("."):
            if stem in texts and extension in IMAGE_EXTENSIONS:
                problem = f"{path}{name}: hidden, as its name begins with a dot; rename it and its text"
                yield broken_record(inner + name, problem)
        elif extension == ".txt":
            continue
        elif extension in OTHER_IMAGE_EXTENSIONS:
            yield broken_record(inner + name, unsupported_image(path + name))
        elif stem in texts or not (other := alike.get(_folded(stem))):
            yield inner + name
        else:
            fix = "rename it if it is the image's prompt, else move it elsewhere"
            problem = f"{path}{name}: the text file {other}.txt has almost its name; {fix}"
            yield broken_record(inner + name, problem)


def folder_records(
    root: str, names: Iterable[str | Record], prompt: str | None, needs_prompt: bool = True
) -> Iterator[Record]:
    """Yields the records of a folder's images. The sidecar is taken, or else `prompt`.

    Args:
      root: the folder.
      names: the results of `folder_names`.
      prompt: the prompt of images that have no sidecar; None: these don't load if they need one.
      needs_prompt: whether each image needs a prompt.
    """
    for name in names:
        if isinstance(name, Record):
            yield name
        else:
            path = os.path.join(root, name)
            load = functools.partial(_load_file, path, None, prompt, needs_prompt)
            yield Record(printable(name), load, path=path)


def _wanted(entry: os.DirEntry) -> str:
    """Returns the name of a picture or text; with "/" added (for sorting), of a folder; '' for others.

    Hidden folders are left out, and what macOS writes beside files ("._a.jpg").
    """
    if entry.name.startswith("._"):
        return ""
    if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
        return "" if entry.name.startswith(".") else f"{entry.name}/"
    known = (*IMAGE_EXTENSIONS, *OTHER_IMAGE_EXTENSIONS, ".txt")
    return entry.name if _split(entry.name)[1] in known else ""


def _split(name: str) -> tuple[str, str]:
    """Returns a name's stem and its extension in small letters."""
    stem, extension = os.path.splitext(name)
    return stem, extension.lower()


def _folded(stem: str) -> str:
    """Returns a key that is the same for names that differ in capitals or in how accents are encoded."""
    return unicodedata.normalize("NFC", stem).casefold()


def _load_file(path: str, prompt: str | None, fallback: str | None, needs_prompt: bool) -> tuple[bytes, str]:
    """Returns an image with `prompt`, or else the sidecar's prompt, or else `fallback`, or else ""."""
    fallback = "" if fallback is None and not needs_prompt else fallback
    if prompt is None:
        sidecar = _sidecar(path)
        if fallback is not None and not os.path.lexists(sidecar):
            prompt = fallback
        else:
            text = read_bytes(sidecar, sidecar, _PROMPT_FIX, most=MAX_TEXT_BYTES)
            prompt = checked_prompt(text, sidecar, needs_prompt)
    return read_bytes(path, path), prompt


def _sidecar(path: str) -> str:
    """Returns the path of an image's text file; if there is none, the path that it would have.

    Raises:
      InputError: there are two, as a.txt and a.TXT.
    """
    stem = os.path.splitext(path)[0]
    # Where capitals don't count, all these names are those of one file.
    found = {_identity(f"{stem}{end}"): f"{stem}{end}" for end in _TEXT_EXTENSIONS[::-1]}
    found.pop(None, None)
    if len(found) > 1:
        raise InputError(f"{path}: two texts may be its prompt: {', '.join(sorted(found.values()))}")
    return next(iter(found.values()), f"{stem}.txt")


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino
