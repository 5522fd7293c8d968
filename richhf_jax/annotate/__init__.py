"""The page where raters mark images: a project's folder, its database, who gets which image, the web server.

Without JAX and TensorFlow. `python -m richhf_jax.annotate` has the commands.
"""
