"""Checkpoints -> what runs or is read elsewhere: `python -m richhf_jax.export`."""
