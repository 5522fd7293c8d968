"""Finds where the records of TFRecord files start, so that they can be read in any order.

A scan takes one read per record: thousands of round trips if the files are in a bucket. So the commands that
build data sets save the result beside the files, in one small index per folder (`write_index`). Files that no
index describes are scanned. The index of data that something else built is written by

    python -m richhf_jax.datasets.records FOLDER
"""

import argparse
import concurrent.futures
import io
import zipfile
from collections.abc import Sequence

import numpy as np
from absl import logging
from etils import epath

from richhf_jax import errors, foreign_text, writing
from richhf_jax.datasets import tfrecord

INDEX_NAME = "record_offsets.npz"
# Threads that wait for a bucket's answers.
_THREADS = 32


def record_offsets(path: epath.PathLike) -> np.ndarray:
    """Scans a TFRecord file, header by header.

    Args:
      path: local or gs://.

    Returns:
      int64 [records], the byte at which each record starts.

    Raises:
      ValueError: the file ends within a record, or a record's length is garbled.
    """
    path = epath.Path(path)
    offsets = []
    try:
        with path.open("rb") as file:
            for offset in tfrecord.offsets(file, _size(path)):
                offsets.append(offset)
    except tfrecord.RecordError as error:
        raise ValueError(
            f"{path}: record {len(offsets)} is cut off or garbled ({error}); build the data set again"
        ) from error
    return np.array(offsets, np.int64)


def write_index(folder: epath.PathLike) -> None:
    """Scans the TFRecord files in a TFDS data set's folder and saves their records' offsets beside them.

    The index is a .npz file of
        names    [files]    str
        sizes    [files]    int64, bytes: a file of another size isn't the one that was scanned
        counts   [files]    int64, records
        offsets  [records]  int64, as `record_offsets` returns them, one file after the other

    Raises:
      ValueError: a file ends within a record.
      FileNotFoundError: there is no TFRecord file.
    """
    folder = epath.Path(folder)
    paths = sorted(folder.glob("*.tfrecord-*"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no files *.tfrecord-*")
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        sizes = list(threads.map(_size, paths))
        offsets = list(threads.map(record_offsets, paths))
    buffer = io.BytesIO()
    np.savez(
        buffer,
        names=np.array([path.name for path in paths], np.str_),
        sizes=np.array(sizes, np.int64),
        counts=np.array([len(part) for part in offsets], np.int64),
        offsets=np.concatenate(offsets),
    )
    writing.write(folder / INDEX_NAME, buffer.getvalue())


def locate(parts: Sequence[tuple[str, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists the records of several parts of files as one sequence.

    A file isn't opened if its folder's index has its name and size.

    Args:
      parts: (path, records to skip, records to take), as TFDS's file instructions say.

    Returns:
      For each record, int64 [records]: the index of its part in `parts`, and the byte of that part's file at
      which the record starts.

    Raises:
      ValueError: a file ends within a record.
    """
    paths = [epath.Path(path) for path, _, _ in parts]
    indexes = {folder: _read_index(folder) for folder in {path.parent for path in paths}}
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        known = threads.map(lambda path: _known_offsets(path, indexes[path.parent]), paths)
        offsets = [part[skip:][:take] for part, (_, skip, take) in zip(known, parts, strict=True)]
    numbers = np.repeat(np.arange(len(parts)), [len(part) for part in offsets])
    return numbers, np.concatenate(offsets)


def _size(path: epath.Path) -> int:
    return path.stat().length


def _read_index(folder: epath.Path) -> dict[str, tuple[int, np.ndarray]]:
    """Reads a folder's index: a file's name -> its size and offsets. It is empty if there is no index."""
    path = folder / INDEX_NAME
    if not path.exists():
        return {}
    try:
        with np.load(io.BytesIO(path.read_bytes())) as index:
            names, sizes = index["names"].tolist(), index["sizes"].tolist()
            offsets = np.split(index["offsets"], np.cumsum(index["counts"])[:-1])
    except (ValueError, KeyError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile) as error:
        logging.warning("%s can't be read (%s); scanning the files", path, error)
        return {}
    return dict(zip(names, zip(sizes, offsets, strict=True), strict=True))


def _known_offsets(path: epath.Path, index: dict[str, tuple[int, np.ndarray]]) -> np.ndarray:
    """Returns a file's offsets: from the index if it describes this very file, else by a scan."""
    if path.name in index:
        size, offsets = index[path.name]
        if size == _size(path):
            return offsets
        logging.warning("%s: its size isn't the one in %s; scanning the file", path, INDEX_NAME)
    return record_offsets(path)


@errors.command()
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m richhf_jax.datasets.records",
        description="Saves where the records of a TFDS data set are, so that training on it starts at once.",
    )
    parser.add_argument("folder", help="folder of the TFRecord files, e.g. DIR/coco_captions/2014/1.1.0")
    folder = parser.parse_args(arguments).folder
    try:
        write_index(folder)
    except (OSError, ValueError) as error:
        raise errors.UserError(foreign_text.for_terminal(str(error))) from error
    print(epath.Path(folder) / INDEX_NAME)


if __name__ == "__main__":
    main()
