"""Scores images, in Python and by command. Nothing in here imports TensorFlow, seqio or gin."""
