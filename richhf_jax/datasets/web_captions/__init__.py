"""Shards of web images with alt-text -> the TFDS data set `web_captions`: see `__main__`."""
