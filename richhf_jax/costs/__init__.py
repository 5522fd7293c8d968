"""Costs of a compiled program (FLOPs, bytes, collectives), compared with the abilities of a chip."""
