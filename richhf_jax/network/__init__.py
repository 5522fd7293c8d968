"""The RAHF network in Flax linen: layers, T5, ViT, heads, and their composition."""
