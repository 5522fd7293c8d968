"""What is in a data set: `python -m richhf_jax.datasets.describe`."""
