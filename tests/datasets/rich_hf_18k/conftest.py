"""Fixtures: a sample of RichHF-18K in every source's form, the command, and readers of what it built."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence

import pytest

from richhf_jax import feedback
from richhf_jax.datasets import sample_sources

MAPS = tuple(feedback.HEATMAP_FIELDS.values())
TFDS_SPLITS = {"train": "train", "dev": "validation", "test": "test"}


@pytest.fixture(scope="session")
def samples() -> list[sample_sources.Sample]:
    """Makes eight images of train, two of dev and two of test."""
    return sample_sources.make_samples(12)


@dataclasses.dataclass
class Workbench:
    """A folder with sources, and the command.

    `labels`, `shards`, `joined` and `images` are folders of sources, written by `write`.
    """

    root: pathlib.Path
    capsys: pytest.CaptureFixture
    output: str = ""

    def write(self, samples: Sequence[sample_sources.Sample]) -> None:
        sample_sources.write_labels(self.labels, samples)
        sample_sources.write_pick_a_pic(self.shards, samples)

    def __post_init__(self):
        self.labels = self.root / "labels"
        self.shards = self.root / "pick_a_pic/data"
        self.data_dir = self.root / "tfds"
        self.work_dir = self.data_dir / "downloads/manual/rich_hf_18k"

    def run(self, *options: str, labels: bool = True) -> str | None:
        """Runs the command, by default with Pick-a-Pic, and returns its error message."""
        import richhf_jax.datasets.rich_hf_18k.__main__ as command

        if not any(option.startswith(("--joined", "--images", "--pick_a_pic")) for option in options):
            options = (*options, f"--pick_a_pic={self.shards}")
        if labels:
            options = (*options, f"--labels={self.labels}")
        try:
            command.main([f"--data_dir={self.data_dir}", *options])
            message = None
        except SystemExit as error:
            message = str(error.code)
        self.output = self.capsys.readouterr().out
        return message

    @property
    def built(self) -> bool:
        return (self.data_dir / "rich_hf_18k/1.0.0/dataset_info.json").exists()

    @property
    def report(self) -> dict:
        """Reads the report beside the data, or that of the join if there is no data."""
        folder = self.data_dir / "rich_hf_18k/1.0.0" if self.built else self.work_dir
        return json.loads((folder / "report.json").read_text())

    def examples(self) -> dict[str, dict]:
        """Reads the data set: file name -> its features, with bytes as they are stored, and the split."""
        import tensorflow_datasets as tfds

        from richhf_jax.datasets.rich_hf_18k import builder

        built = builder.RichHf18k(data_dir=self.data_dir)
        raw = dict.fromkeys((feedback.IMAGE_FIELD, *MAPS), tfds.decode.SkipDecoding())
        found = {}
        for split in built.info.splits:
            for example in tfds.as_numpy(built.as_dataset(split=split, decoders=raw)):
                found[example[feedback.FILENAME_FIELD].decode()] = {**example, "split": split}
        return found


@pytest.fixture
def bench(tmp_path, capsys) -> Workbench:
    return Workbench(tmp_path, capsys)


@pytest.fixture
def shards_read(monkeypatch) -> list[str]:
    """Records the names of the shards whose rows are asked for, in order."""
    from richhf_jax.datasets.rich_hf_18k import sources

    names = []

    def recording(rows: Callable):
        def record(self, shard, *arguments):
            names.append(shard.name)
            return rows(self, shard, *arguments)

        return record

    for cls in (sources.PickAPic, sources.Joined, sources.Images):
        monkeypatch.setattr(cls, "rows", recording(cls.rows))
    return names
