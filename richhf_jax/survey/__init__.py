"""The blind survey of two generators' images, or of several generators' (the paper's Table 5)."""
