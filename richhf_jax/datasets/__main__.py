"""Builds the synthetic data sets: python -m richhf_jax.datasets --data_dir=DIR."""

import argparse
import os
import sys
import time
from collections.abc import Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # Nothing here concerns a GPU.

# Rendering processes import the main module again, unless it is a package's __main__. This file is one, so
# that they start without TensorFlow.
import tensorflow_datasets as tfds

from richhf_jax import errors, writing
from richhf_jax.datasets import scenes, synthetic_captions, synthetic_rich_hf

BUILDERS = (synthetic_rich_hf.SyntheticRichHf, synthetic_captions.SyntheticCaptions)


def build(data_dir: str | None, config: str) -> None:
    """Builds the data sets of a configuration that aren't there yet.

    Raises:
      OSError: the folder can't be written.
    """
    for builder_class in BUILDERS:
        if config not in builder_class.builder_configs:
            continue
        start = time.monotonic()
        builder = builder_class(config=config, data_dir=data_dir)
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
        sizes = ", ".join(f"{split.num_examples} {name}" for name, split in builder.info.splits.items())
        print(f"{builder.info.full_name}: {sizes}; {time.monotonic() - start:.0f} s; {builder.data_dir}")


@errors.command()
def main(arguments: Sequence[str] | None = None) -> None:
    """Builds the data sets that aren't there yet."""
    parser = argparse.ArgumentParser(
        prog="python -m richhf_jax.datasets",
        description="Builds synthetic_rich_hf and synthetic_captions, unless they are there already.",
    )
    parser.add_argument("--data_dir", help="TFDS's folder; default: ~/tensorflow_datasets")
    parser.add_argument("--config", choices=sorted(scenes.CONFIGS), default="default")
    options = parser.parse_args(arguments)
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    with writing.explained_disk_errors(options.data_dir or "~/tensorflow_datasets"):
        build(options.data_dir, options.config)


if __name__ == "__main__":
    main()
