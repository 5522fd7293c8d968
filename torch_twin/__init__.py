"""RAHF's network in PyTorch, for `benchmarks.steps --torch` and its test. The wheel doesn't contain it."""
