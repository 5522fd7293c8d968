"""Exports checkpoints to programs and weights for use elsewhere: `python -m richhf_jax.export`."""
