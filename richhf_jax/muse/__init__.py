"""Muse, a generator of images: a tokenizer of images, and a transformer that fills in masked tokens."""
