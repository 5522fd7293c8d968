"""The oracle of the synthetic world: what is in a picture, and how good it is, from pixels and prompt alone.

It knows the world's shapes, colours and backgrounds (`drawing`), but neither scene files nor RAHF. So it can
judge pictures that a generator made.
"""

from richhf_jax.datasets.oracle.judge import Judgement, judge

__all__ = ["Judgement", "judge"]
