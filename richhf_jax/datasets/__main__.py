"""Builds the synthetic data sets: python -m richhf_jax.datasets --data_dir=DIR."""

import argparse

# Worker processes import the main module anew, except one that is called __main__: so they come
# up without TensorFlow.
import tensorflow_datasets as tfds

from richhf_jax.datasets import scenes, synthetic_captions, synthetic_rich_hf

BUILDERS = (synthetic_rich_hf.SyntheticRichHf, synthetic_captions.SyntheticCaptions)


def main() -> None:
    """Builds what isn't there yet."""
    parser = argparse.ArgumentParser(
        prog="python -m richhf_jax.datasets", description="Builds the synthetic data sets."
    )
    parser.add_argument("--data_dir", help="default: TFDS's, ~/tensorflow_datasets")
    parser.add_argument("--config", choices=sorted(scenes.CONFIGS), default="default")
    options = parser.parse_args()
    for builder in BUILDERS:
        if options.config in builder.builder_configs:
            builder(config=options.config, data_dir=options.data_dir).download_and_prepare(
                download_config=tfds.download.DownloadConfig(try_download_gcs=False)
            )


if __name__ == "__main__":
    main()
