"""RAHF's network in PyTorch, for `benchmarks.steps --torch` and its test. No part of the wheel."""
