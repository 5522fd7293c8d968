"""RAHF in JAX: rich human feedback for text-to-image generation. Importing this loads nothing heavy."""

__version__ = "0.1.0"
