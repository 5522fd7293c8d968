"""Builds TFDS data sets from raw annotations, published files and procedural scenes.

Importing a builder's module (`synthetic_rich_hf`, `synthetic_captions`, `rich_hf_18k.builder`) registers it
with TFDS; importing this package alone imports nothing heavy.
"""

# TFDS name -> the command that builds it.
BUILD_COMMANDS = {
    "synthetic_rich_hf": "python -m richhf_jax.datasets --data_dir=DIR",
    "synthetic_captions": "python -m richhf_jax.datasets --data_dir=DIR",
    "rich_hf_18k": "python -m richhf_jax.datasets.rich_hf_18k --data_dir=DIR ... (see its --help)",
    "web_captions": "python -m richhf_jax.datasets.web_captions --data_dir=DIR ... (see its --help)",
    "coco_captions": "tfds build coco_captions --data_dir=DIR",
}
