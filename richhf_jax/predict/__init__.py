"""Scores images, in Python and by command. Nothing in this folder imports TensorFlow, seqio or gin."""
