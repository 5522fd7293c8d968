"""Makes examples on all cores, without TensorFlow, which each process would have to import."""

import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator

from richhf_jax import feedback
from richhf_jax.datasets import consolidate, raters, scenes

# With fewer examples than this, starting processes takes longer than making the examples.
MIN_EXAMPLES = 1000
CHUNK = 32  # examples that a process takes at once


def rated_example(config: scenes.SceneConfig, name: str) -> dict:
    """Makes an example: the picture `name`, its prompt, and the consolidated answers of the raters."""
    image, truth = scenes.render(config, name)
    ratings = [raters.rate(config, name, truth, rater_id) for rater_id in raters.LEANINGS]
    return {
        **consolidate.consolidate(ratings),
        feedback.IMAGE_FIELD: consolidate.encode_png(image),
        feedback.PROMPT_FIELD: truth.scene.description.prompt,
    }


def captioned_example(config: scenes.SceneConfig, name: str) -> dict:
    """Makes an example: the picture `name` and its prompt."""
    image, truth = scenes.render(config, name)
    return {
        feedback.FILENAME_FIELD: name,
        feedback.IMAGE_FIELD: consolidate.encode_png(image),
        feedback.PROMPT_FIELD: truth.scene.description.prompt,
    }


def examples(
    make: Callable[[scenes.SceneConfig, str], dict],
    config: scenes.SceneConfig,
    split: str,
    count: int,
    processes: int | None = None,
) -> Iterator[tuple[str, dict]]:
    """Makes a split's examples.

    Args:
      make: (configuration, name of a picture) -> its example; other processes must be able to import it.
      config: configuration of the scenes.
      split: name of the split.
      count: number of examples.
      processes: by default one per core if there are enough examples. The examples don't depend on it.

    Yields:
      Name and example.
    """
    names = [scenes.filename(split, index) for index in range(count)]
    make_one = functools.partial(make, config)
    if processes is None:
        processes = len(os.sched_getaffinity(0)) if count >= MIN_EXAMPLES else 1
    if processes == 1:
        yield from zip(names, map(make_one, names), strict=True)
        return
    # Forking a process in which TensorFlow runs threads may deadlock.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from zip(names, pool.imap(make_one, names, chunksize=CHUNK), strict=True)
