"""RichHF-18K: its labels joined with images and prompts, as a TFDS data set.

    python -m richhf_jax.datasets.rich_hf_18k --help

`labels` reads the labels, `sources` the images and prompts (through `remote`), `join` brings them together
and can be stopped anywhere, `report` says what came of it, and `builder` (importing it registers
`rich_hf_18k`) makes the TFDS data set of it.
"""
