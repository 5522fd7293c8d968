"""Describes a data set: `python -m richhf_jax.datasets.describe`."""
