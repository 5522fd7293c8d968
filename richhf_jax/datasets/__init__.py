"""Data sets: raw annotations and procedural scenes -> TFDS builders.

Importing a builder's module (`synthetic_rich_hf`, `synthetic_captions`) registers it with TFDS;
importing this package alone imports nothing heavy.
"""
