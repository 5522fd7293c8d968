"""Makes examples on all cores. Free of TensorFlow, which each process would have to import."""

import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence

from richhf_jax import feedback
from richhf_jax.datasets import consolidate, raters, scenes

# Starting processes takes longer than making fewer examples than this.
MIN_EXAMPLES = 500
CHUNK = 32


def rated_example(config: scenes.SceneConfig, name: str) -> dict:
    """The picture `name` with its prompt and what the raters' consolidated answers say."""
    image, truth = scenes.render(config, name)
    (record,) = consolidate.consolidate_lines(raters.raw_lines(config, name, truth))
    return {
        **record,
        feedback.IMAGE_FIELD: consolidate.encode_png(image),
        feedback.PROMPT_FIELD: truth.scene.description.prompt,
    }


def captioned_example(config: scenes.SceneConfig, name: str) -> dict:
    """The picture `name` with its prompt."""
    image, truth = scenes.render(config, name)
    return {
        feedback.FILENAME_FIELD: name,
        feedback.IMAGE_FIELD: consolidate.encode_png(image),
        feedback.PROMPT_FIELD: truth.scene.description.prompt,
    }


def run(
    make: Callable[[scenes.SceneConfig, str], dict],
    config: scenes.SceneConfig,
    names: Sequence[str],
    processes: int | None = None,
) -> Iterator[dict]:
    """Yields `make(config, name)` for each name, in order, from as many processes as there are cores."""
    make = functools.partial(make, config)
    processes = processes or len(os.sched_getaffinity(0))
    if processes == 1 or len(names) < MIN_EXAMPLES:
        yield from map(make, names)
        return
    # Forking a process in which TensorFlow runs threads may deadlock.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(make, names, chunksize=CHUNK)
