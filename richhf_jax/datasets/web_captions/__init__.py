"""Builds the TFDS data set `web_captions` from shards of web images with alt-text: see `__main__`."""
