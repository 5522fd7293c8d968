"""Registers seqio tasks and mixtures; `import tasks` registers them all."""

from tasks import captions as captions
from tasks import rich_hf_18k as rich_hf_18k
from tasks import synthetic as synthetic
