"""Trains RAHF of the size of small.gin for 20 steps on 4 devices, for test_multihost.

    python twenty_steps.py DIR 0 127.0.0.1:PORT     process 0 of 2, with 2 of the devices; or process 1
    python twenty_steps.py DIR                      one process, with one of LAYOUTS after the other

DIR/batch.npz holds the examples of 20 steps; the losses go to DIR/<layout>.json.
"""

import json
import pathlib
import sys

import jax
import numpy as np

from richhf_jax import gin_utils, multihost, partitioning
from richhf_jax import trainer as trainer_lib

STEPS = 20
LAYOUTS = {
    "data": {},
    "fully_sharded": {"logical_axis_rules": partitioning.standard_logical_axis_rules(2)},
    "tensor": {"num_partitions": 2},
}


def losses(batches: dict[str, np.ndarray], devices: int, layout: dict) -> list[float]:
    """Computes the losses of 20 steps, on this process's part of the batches.

    Args:
      batches: name -> [steps * batch, ...].
      devices: the devices of this process.
      layout: arguments of the partitioner.
    """
    partitioner = partitioning.PjitPartitioner(num_cpu_devices=devices, **layout)
    size = len(batches["image"]) // STEPS
    shapes = {name: jax.ShapeDtypeStruct((size, *v.shape[1:]), v.dtype) for name, v in batches.items()}
    trainer = trainer_lib.Trainer(gin_utils.macro("MODEL"), partitioner, shapes)
    part = partitioner.get_data_layout(size)
    rows = size // part.num_shards
    # Random numbers by numpy: the network's own initialisers take seconds to compile.
    rng = np.random.default_rng(4)
    params = jax.tree_util.tree_flatten_with_path(trainer.abstract_state.params)[0]
    given = {}
    for path, leaf in params:
        value = rng.normal(0, 0.5 * np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape).astype(leaf.dtype)
        name = tuple(key.key for key in path)
        given[name] = jax.make_array_from_callback(leaf.shape, leaf.sharding, value.__getitem__)
    state = trainer.init_state(given)
    metrics = []
    for step in range(STEPS):
        first = step * size + part.shard_id * rows
        batch = {name: value[first : first + rows] for name, value in batches.items()}
        state, of_step = trainer.train_step(state, batch)
        metrics.append(of_step)
    return [trainer_lib.summarize([of_step])["loss"] for of_step in metrics]


def main(folder: str, index: str | None = None, address: str | None = None) -> None:
    """Runs the steps of the command line, see the top of this file."""
    tests = str(pathlib.Path(__file__).parent)
    files = ["models/rahf.gin", "small.gin", "variants/augmented_prompt.gin", "losses/default.gin"]
    bindings = [
        "DROPOUT_RATE = 0.1",
        # To split over 4 devices.
        "rahf.HeadsConfig.heatmap_layers = (('deconv', 8, 3),)",
        "rahf.HeadsConfig.score_conv_layers = ((8, 2),)",
        "optimizers.create_learning_rate_scheduler.base_learning_rate = 0.01",
        "optimizers.create_learning_rate_scheduler.warmup_steps = 5",
    ]
    gin_utils.parse_gin_flags([tests, *gin_utils.DEFAULT_SEARCH_PATHS], files, bindings)
    batches = dict(np.load(f"{folder}/batch.npz"))
    if index is None:
        results = {name: losses(batches, 4, layout) for name, layout in LAYOUTS.items()}
    else:
        with multihost.session(address, 2, int(index)):
            results = {f"process_{index}": losses(batches, 2, {})}
    for name, values in results.items():
        (pathlib.Path(folder) / f"{name}.json").write_text(json.dumps(values))


if __name__ == "__main__":
    main(*sys.argv[1:])
