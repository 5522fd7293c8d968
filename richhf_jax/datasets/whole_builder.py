"""Base of the TFDS builders: a data set gets its name when all of it, with its index, is on the disk."""

import json
import os
import pathlib
import shutil
import stat

import tensorflow_datasets as tfds
from etils import epath

from richhf_jax import locking, writing
from richhf_jax.datasets import records


class WholeBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Builder that synchronises its files before the last renaming; TFDS's own leaves that to the system."""

    def finish(self, folder: epath.Path) -> None:
        """Adds files to the finished data set in `folder`: the index of its records."""
        records.write_index(folder)

    def download_and_prepare(self, **options) -> None:
        """Builds the data set, unless it is there; see TFDS.

        Raises:
          errors.UserError: another process builds the data set, or the folder can't be written.
          OSError: the folder can't be written.
        """
        final = self.data_path
        if "://" in os.fspath(final):  # A bucket keeps what it has taken, and renaming there is copying.
            is_new = not final.exists()
            super().download_and_prepare(**options)
            if is_new:
                self.finish(final)
            return
        writing.make_folder(final.parent)
        with locking.held(final.parent, "--data_dir"):
            if final.exists():
                super().download_and_prepare(**options)
            else:
                self._build(final, options)
            self._save_default_config(final)

    def _log_download_bytes(self) -> None:
        """Says nothing: TFDS would name the temporary folder, and the commands name the data set."""

    _log_download_done = _log_download_bytes

    def _build(self, final: epath.Path, options: dict) -> None:
        new = final.with_name(f".{final.name}.new")
        # A killed build left them: its own folder, and TFDS's temporary ones of that.
        # Whether a "*" matches the dot of its own folder depends on the version of etils.
        for left in (new, *final.parent.glob(f"*{new.name}")):
            shutil.rmtree(left, ignore_errors=True)
        new.mkdir()
        usual = stat.S_IMODE(
            os.stat(new).st_mode
        )  # TFDS makes folders of others' rights, whatever the umask.
        new.rmdir()
        self._data_dir = os.fspath(new)
        try:
            super().download_and_prepare(**options)
            self.finish(new)
            os.chmod(new, usual)
            writing.give_usual_permissions(pathlib.Path(new))
            writing.move(new, final)
        finally:
            self._data_dir = os.fspath(final)
        self.info.update_data_dir(self._data_dir)

    def _save_default_config(self, final: epath.Path) -> None:
        """Writes TFDS's file of the default configuration again: TFDS doesn't synchronise it."""
        if default := self.get_default_builder_config():
            folder = final.parents[1] / ".config"
            writing.make_folder(folder)
            writing.write(folder / "metadata.json", json.dumps({"default_config_name": default.name}))
