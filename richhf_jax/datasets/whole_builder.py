"""Base of the TFDS builders: a data set gets its name when all of it, with its index, is on the disk."""

import os
import shutil

import tensorflow_datasets as tfds
from etils import epath

from richhf_jax import writing
from richhf_jax.datasets import records


class WholeBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Builder that synchronises its files before the last renaming; TFDS's own leaves that to the system."""

    def finish(self, folder: epath.Path) -> None:
        """Adds files to the finished data set in `folder`: the index of its records."""
        records.write_index(folder)

    def download_and_prepare(self, **options) -> None:
        """Builds the data set, unless it is there; see TFDS.

        Raises:
          OSError: the folder can't be written.
        """
        final = self.data_path
        if final.exists():
            super().download_and_prepare(**options)
            return
        if "://" in os.fspath(final):  # A bucket keeps what it has taken, and renaming there is copying.
            super().download_and_prepare(**options)
            self.finish(final)
            return
        new = final.with_name(f".{final.name}.new")
        shutil.rmtree(new, ignore_errors=True)  # A kill just before the renaming leaves it.
        self._data_dir = os.fspath(new)
        try:
            super().download_and_prepare(**options)
            self.finish(new)
            writing.move(new, final)
        finally:
            self._data_dir = os.fspath(final)
        self.info.update_data_dir(self._data_dir)
