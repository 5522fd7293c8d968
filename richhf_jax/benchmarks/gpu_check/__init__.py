"""Measures everything that a machine with one GPU can tell, within minutes: see `__main__`."""
