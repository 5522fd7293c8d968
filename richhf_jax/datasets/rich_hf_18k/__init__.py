"""Joins RichHF-18K's labels with images and prompts into a TFDS data set.

    python -m richhf_jax.datasets.rich_hf_18k --help

`labels` reads the labels, and `sources` the images and prompts (through `remote`). `join` brings them
together, and can be stopped at any time. `report` sums up the result. `builder` makes the TFDS data set;
importing it registers `rich_hf_18k`.
"""
