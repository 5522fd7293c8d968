"""TFDS builder `rich_hf_18k`: RichHF-18K with images and prompts, from the work folder of the join."""

import json
import pathlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from etils import epath

from richhf_jax import errors, feedback, writing
from richhf_jax.datasets import records, tfrecord, whole_builder
from richhf_jax.datasets.rich_hf_18k import join, labels, report

# Split of the data set -> name of its file of labels.
SPLITS = {"train": "train", "validation": "dev", "test": "test"}
# Rows of a part that are in memory at once.
_BATCH_ROWS = 16


class RichHf18k(whole_builder.WholeBuilder):
    """Rich human feedback on 17,760 generated images (https://arxiv.org/abs/2312.10240).

    The features are those of `synthetic_rich_hf`. Images and heatmaps have their own sizes. An unknown score
    is NaN.
    """

    name = "rich_hf_18k"
    VERSION = tfds.core.Version("1.0.0")
    _report = b""
    MANUAL_DOWNLOAD_INSTRUCTIONS = """\
    The labels must be joined with images first. `python -m richhf_jax.datasets.rich_hf_18k` does this and
    builds the data set; see its --help. `manual_dir` is its --work_dir.
    """

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            feedback.FILENAME_FIELD: tfds.features.Text(),
            feedback.IMAGE_FIELD: tfds.features.Image(shape=(None, None, 3)),
            feedback.PROMPT_FIELD: tfds.features.Text(),
            **{field: tfds.features.Scalar(np.float32) for field in feedback.SCORE_FIELDS.values()},
            **{
                field: tfds.features.Image(shape=(None, None, 1))
                for field in feedback.HEATMAP_FIELDS.values()
            },
            feedback.KEYWORDS_FIELD: tfds.features.Text(),
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            homepage="https://github.com/google-research/google-research/tree/master/richhf_18k",
        )

    def _split_generators(self, dl_manager):
        work_dir = pathlib.Path(dl_manager.manual_dir)
        check_joined(work_dir)
        self._report = (work_dir / report.FILE).read_bytes()
        return {split: self._generate_examples(work_dir, name) for split, name in SPLITS.items()}

    def finish(self, folder: epath.Path) -> None:
        """Adds the index of the records, and the report of the join."""
        super().finish(folder)
        if self._report:
            writing.write(folder / report.FILE, self._report)

    def _generate_examples(self, work_dir: pathlib.Path, split: str):
        for example in examples(work_dir, split):
            yield example[feedback.FILENAME_FIELD], example


def check_joined(work_dir: pathlib.Path) -> None:
    """Checks that the join is finished.

    Raises:
      errors.UserError: it isn't finished, or it left out more than was allowed.
    """
    path = work_dir / report.FILE
    problem = (
        json.loads(path.read_text(encoding="utf-8"))["problem"]
        if path.exists()
        else "the join isn't finished"
    )
    if problem:
        raise errors.UserError(
            f"{work_dir}: {problem}\nGive the command `python -m richhf_jax.datasets.rich_hf_18k` again."
        )


def examples(work_dir: pathlib.Path, split: str) -> Iterator[dict]:
    """Yields the examples of a split ('train', 'dev' or 'test'), in the order in which images were found.

    Few of them are in memory at a time.
    """
    offsets = _label_offsets(work_dir, split)
    columns = [join.UID, feedback.PROMPT_FIELD, feedback.IMAGE_FIELD]
    with (work_dir / "labels" / f"{split}.tfrecord").open("rb") as file:
        for path in join.parts(work_dir):
            part = pq.ParquetFile(path)
            for group in range(part.num_row_groups):
                uids = part.read_row_group(group, columns=[join.UID])[join.UID].to_pylist()
                if offsets.keys().isdisjoint(uids):
                    continue
                for batch in part.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns):
                    for row in batch.to_pylist():
                        if (uid := row.pop(join.UID)) in offsets:
                            yield row | _label(file, offsets[uid])


def _label(file: BinaryIO, offset: int) -> labels.Record:
    file.seek(offset)
    data = next(tfrecord.read(file))
    try:
        if isinstance(data, tfrecord.RecordError):
            raise data
        return labels.parse(data)
    except (tfrecord.RecordError, labels.BadRecordError) as error:
        again = f"delete {pathlib.Path(file.name).parent} and give the command again"
        raise errors.UserError(f"{file.name}: offset {offset}: {error}; {again}") from error


def _label_offsets(work_dir: pathlib.Path, split: str) -> dict[str, int]:
    """Finds where each record starts in a split's file of labels: uid -> byte."""
    offsets = records.record_offsets(str(work_dir / "labels" / f"{split}.tfrecord"))
    return dict(zip(labels.load(work_dir).keywords[split], offsets.tolist(), strict=True))
