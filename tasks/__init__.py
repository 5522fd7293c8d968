"""seqio tasks and mixtures. `import tasks` registers them all."""

from tasks import synthetic as synthetic
