"""Measures the model's train step and predict step on this machine's devices.

A step takes random images and tokens, of the preset's image size, from the host's memory; it ends when the
devices are done. Training: AdamW with its state in float32; the augmented prompt has 4 prompts an image (1
heatmap, 2 scores, 1 text). Prediction: all seven outputs; the text is decoded greedily to its full length;
the augmented prompt has 7 prompts an image. The preset chooses what is computed in bfloat16.

With --torch the same model in PyTorch (torch.compile, autocast, fused AdamW) takes its steps in turn with
ours, on one device. Look at the ratio: both ran in the same minutes.

Model FLOPs are those of one forward pass with teacher forcing, and three times as many for training;
recomputation doesn't count. Utilisation is the ratio between them and the devices' peak bfloat16 FLOPs by
their data sheets. For our steps, peak memory is what XLA reserves on a device for the program with its
arguments; for PyTorch's, it is the most memory that tensors had at once.

gin changes other settings of the model: --gin.REMAT_POLICY=minimal, --gin.SCAN_LAYERS=True, ...
"""

import argparse
import functools
import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

# By default jax takes most of a GPU's memory at its start; PyTorch needs some, too.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import gin
import jax
import numpy as np
from flax import traverse_util

from richhf_jax import errors, feedback, gin_utils, models, partitioning
from richhf_jax import trainer as trainer_lib
from richhf_jax.benchmarks import json_file
from richhf_jax.costs import chips, counter
from richhf_jax.network import rahf

# Lengths in tokens of a prompt and of a text, as in gin/sizes/base.gin.
PROMPT_LENGTH = TARGET_LENGTH = 64
# Slots of a training example, as in gin/variants/.
TRAIN_SLOTS = {feedback.MULTI_HEAD: feedback.ALL_SLOTS, feedback.AUGMENTED_PROMPT: feedback.Slots(1, 2, 1)}
STEPS = ("train", "predict")
# A prime number, so that no two rows of a matrix are equal.
_RANDOM_NUMBERS = 1_048_573
# Timed steps in a turn of a contender. One more step, which isn't counted, begins the turn.
TURN = 5

Batch = Mapping[str, np.ndarray]


def make_model(preset: str, variant: str, bindings: Sequence[str] = ()) -> models.RahfModel:
    """Makes the model of a gin file, with loss weights 1 and texts that never end before their full length.

    Raises:
      errors.UserError: see `gin_utils.parse_gin_flags`.
    """
    gin.clear_config()
    files = [preset, f"variants/{variant}.gin"]
    never_ends = "richhf_jax.models.RahfModel.eos_id = -1"
    gin_utils.parse_gin_flags(gin_utils.DEFAULT_SEARCH_PATHS, files, [*bindings, never_ends])
    return gin_utils.macro("MODEL")


def random_batch(module: rahf.Rahf, slots: feedback.Slots, batch_size: int) -> Batch:
    """Makes a batch like the feature converter's, without padding and with a label in every slot."""
    rng = np.random.default_rng(0)
    height, width = (side * module.vit_config.patch_size for side in module.vit_config.grid)

    def tokens(*shape):
        return rng.integers(2, module.t5_config.vocab_size, (batch_size, *shape), dtype=np.int32)

    def pixels(*shape):
        return rng.integers(0, 256, (batch_size, *shape), dtype=np.uint8)

    targets = tokens(slots.texts, TARGET_LENGTH)
    return {
        "image": pixels(height, width, 3),
        "encoder_input_tokens": tokens(slots.prompts(module.variant), PROMPT_LENGTH),
        "heatmap_targets": pixels(slots.heatmaps, height, width),
        "heatmap_weights": np.ones((batch_size, slots.heatmaps), np.float32),
        "score_targets": rng.random((batch_size, slots.scores), np.float32),
        "score_weights": np.ones((batch_size, slots.scores), np.float32),
        "decoder_input_tokens": np.pad(targets[..., :-1], ((0, 0), (0, 0), (1, 0))),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": np.ones(targets.shape, np.float32),
    }


def random_params(shapes: Any) -> Any:
    """Makes parameters on their devices: scales 1, biases 0, tables of deviation 1, else 1 / sqrt(fan-in).

    A billion random numbers would take half a minute. So a million are drawn, and all arrays repeat them.

    Args:
      shapes: a tree of `ShapeDtypeStruct`s with shardings.
    """
    drawn = np.random.default_rng(0).standard_normal(_RANDOM_NUMBERS, np.float32)

    def value(path, leaf):
        name = path[-1].key
        if "scale" in name:
            array = np.ones(leaf.shape, leaf.dtype)
        elif "bias" in name:
            array = np.zeros(leaf.shape, leaf.dtype)
        else:
            is_stack = any(step.key == "layers" for step in path)
            fan_in = 1 if "embedding" in name else math.prod(leaf.shape[is_stack:-1])
            array = np.resize(drawn / np.float32(fan_in**0.5), leaf.shape).astype(leaf.dtype, copy=False)
        return jax.device_put(array, leaf.sharding)

    return jax.tree_util.tree_map_with_path(value, shapes)


class OurSteps:
    """Our steps, as the trainer compiles them.

    Attributes:
      devices: the devices that share a batch.
      flops_per_image: the model's FLOPs an image, in the step counted last.
    """

    def __init__(
        self,
        model: models.RahfModel,
        devices: Sequence[partitioning.Device],
        compiler_options: Mapping[str, str | bool] | None = None,
    ):
        self._model = model
        self._partitioner = partitioning.PjitPartitioner(devices=devices, compiler_options=compiler_options)
        # Set by `lower`, `compile` and `initialise`.
        self._trainer: Any = None
        self._lowered: Any = None
        self._compiled: Any = None
        self._step, self._batch_size = "", 0
        self._state: Any = None
        self.devices = devices
        self.flops_per_image = 0.0

    def prepare(self, step: str, batch: Batch) -> None:
        """Compiles a step for `run`, and makes a training state if there is none yet; prints the seconds.

        Raises:
          errors.UserError: the batch doesn't split over the devices.
        """
        lower = functools.partial(self.lower, step, batch)
        for name, part in {"lower": lower, "compile": self.compile, "initialise": self.initialise}.items():
            begin = time.perf_counter()
            part()
            print(f"  jax   {name}: {time.perf_counter() - begin:.4g} s", flush=True)
        self.count_flops()

    def lower(self, step: str, batch: Batch) -> None:
        """Lowers a step, "train" or "predict", for `compile`.

        Raises:
          errors.UserError: the batch doesn't split over the devices.
        """
        batch_size = batch["image"].shape[0]
        self._partitioner.get_data_layout(batch_size)
        shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in batch.items()}
        self._trainer = trainer_lib.Trainer(self._model, self._partitioner, shapes)
        self._step, self._lowered = step, self._trainer.lower(step)
        self._batch_size = batch_size

    def count_flops(self) -> None:
        """Counts the model's FLOPs of the lowered step."""
        flops = counter.model_flops(self._trainer.lower("eval"), training=self._step == "train")
        self.flops_per_image = flops / self._batch_size

    def compile(self) -> None:
        """Compiles the step, which takes no memory of the devices."""
        self._compiled = self._lowered.compile()

    def initialise(self) -> None:
        """Makes a training state of random parameters, if there is none yet."""
        if self._state is None:
            # The network's own initialisers would take minutes to compile on a CPU.
            params = traverse_util.flatten_dict(random_params(self._trainer.abstract_state.params))
            self._state = jax.block_until_ready(self._trainer.init_state(params))

    def run(self, batch: Batch) -> Any:
        """Takes one step, from the batch in the host's memory until the devices are done.

        Returns:
          The metrics of a train step, the predictions of a predict step.
        """
        arrays = self._partitioner.shard_batch(batch)
        if self._step == "train":
            self._state, outputs = self._compiled(self._state, arrays)
            return jax.block_until_ready((self._state, outputs))[1]
        return jax.block_until_ready(self._compiled(trainer_lib.InferenceState.of(self._state), arrays))

    def temporary_bytes(self) -> int:
        """Returns the memory of the program's temporaries on a device."""
        return self._compiled.memory_analysis().temp_size_in_bytes

    def peak_bytes(self) -> int:
        """Returns the program's memory on a device: arguments, results and temporaries."""
        memory = self._compiled.memory_analysis()
        # A donated argument and its result are the same bytes.
        return (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        )


def measure(contenders: Mapping[str, Any], batch: Batch, count: int) -> dict[str, list[float]]:
    """Measures the seconds of `count` steps of each contender, in turns of `TURN`; prints each turn's."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for done in range(0, count, TURN):
        for name, contender in contenders.items():
            contender.run(batch)
            for _ in range(min(TURN, count - done)):
                start = time.perf_counter()
                contender.run(batch)
                seconds[name].append(time.perf_counter() - start)
            turn = statistics.median(seconds[name][done:])
            print(f"  {name:5} steps {done + 1} to {len(seconds[name])}: {turn:.4g} s a step", flush=True)
    return seconds


def figures(
    seconds: Mapping[str, list[float]], contenders: Mapping[str, Any], batch_size: int, flops: float
) -> dict[str, Any]:
    """Computes the figures of one step.

    Args:
      seconds: contender's name -> seconds of its steps.
      contenders: "jax" and perhaps "torch" -> the contender.
      batch_size: images a step.
      flops: the model's FLOPs an image.

    Returns:
      "batch_size", "model_flops_per_image"; for each contender "images_per_second" by the median step,
      "step_seconds", "peak_bytes" and "mfu" (model FLOPs utilisation), None if unknown; and with both
      contenders the "ratio" of images a second, jax / torch.
    """
    devices = contenders["jax"].devices
    chip = chips.spec(devices[0].device_kind)
    result: dict[str, Any] = {"batch_size": batch_size, "model_flops_per_image": flops}
    for name, contender in contenders.items():
        median = statistics.median(seconds[name])
        rate = batch_size / median
        result[name] = {
            "images_per_second": rate,
            "mfu": rate * flops / (chip.peak_flops * len(devices)) if chip else None,
            "peak_bytes": contender.peak_bytes(),
            "step_seconds": {"median": median, "min": min(seconds[name]), "max": max(seconds[name])},
        }
    if "torch" in result:
        result["ratio"] = result["jax"]["images_per_second"] / result["torch"]["images_per_second"]
    return result


def measure_variant(
    model: models.RahfModel, batch_size: int, count: int, with_torch: bool
) -> list[dict[str, Any]]:
    """Measures both steps of a model and returns their figures.

    Raises:
      errors.UserError: the batch doesn't fit the devices or their memory; PyTorch is missing; or the twin
        can't build the model.
    """
    module = cast(rahf.Rahf, model.module)
    ours = OurSteps(model, jax.local_devices()[:1] if with_torch else jax.local_devices())
    contenders = {"jax": ours}
    if with_torch:
        contenders["torch"] = _torch_steps(module)
    rows = []
    for step in STEPS:
        slots = TRAIN_SLOTS[module.variant] if step == "train" else feedback.ALL_SLOTS
        batch = random_batch(module, slots, batch_size)
        print(f"{module.variant} {step}, batches of {batch_size}", flush=True)
        try:
            for contender in contenders.values():
                contender.prepare(step, batch)
            seconds = measure(contenders, batch, count)
        except RuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error):
                raise
            raise errors.UserError(
                f"{module.variant} {step}: a batch of {batch_size} images doesn't fit the device's memory:"
                " take a smaller --batch_size"
            ) from error
        measured = figures(seconds, contenders, batch_size, ours.flops_per_image)
        prompts = slots.prompts(module.variant)
        rows.append({"variant": module.variant, "step": step, "prompts_per_image": prompts, **measured})
        print(describe(rows[-1]), flush=True)
    return rows


def _torch_steps(module: rahf.Rahf) -> Any:
    try:
        from torch_twin import steps as twin_steps
    except ModuleNotFoundError as error:
        fix = "install it with: pip install torch"
        if error.name == "torch_twin":
            fix = "the PyTorch model is only in the repository: give the command in a checkout of it"
        raise errors.UserError(f"--torch: {error}; {fix}") from error
    return twin_steps.TorchSteps(module, PROMPT_LENGTH, TARGET_LENGTH)


def describe(row: Mapping[str, Any]) -> str:
    """Formats the figures of a step, one line for each contender."""
    lines = [
        f"{row['variant']} {row['step']}, batches of {row['batch_size']}, prompts an image:"
        f" {row['prompts_per_image']}, model TFLOP an image: {row['model_flops_per_image'] / 1e12:.3g}"
    ]
    for name in ("jax", "torch"):
        if name in row:
            measured = row[name]
            parts = [f"{measured['images_per_second']:.4g} images/s"]
            if measured["mfu"] is not None:
                parts.append(f"{measured['mfu']:.1%} of peak FLOP/s")
            if measured["peak_bytes"] is not None:
                parts.append(f"{measured['peak_bytes'] / 2**30:.3g} GiB")
            lines.append(f"  {name:5} " + ", ".join(parts))
    if "ratio" in row:
        lines.append(f"  ratio {row['ratio']:.2f}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m richhf_jax.benchmarks.steps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--preset",
        default="models/rahf_base.gin",
        metavar="FILE",
        help="a file of gin/models/ (default models/rahf_base.gin)",
    )
    parser.add_argument("--variant", choices=[*TRAIN_SLOTS, "both"], default="both")
    parser.add_argument("--batch_size", type=int, default=8, help="images a step (default 8)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each kind (default 20)")
    parser.add_argument("--torch", action="store_true", help="measure PyTorch, too; both then use one device")
    json_file.add_flag(parser)
    parser.add_argument(
        "--gin_bindings", action="append", default=[], metavar="NAME=VALUE", help="or --gin.NAME=VALUE"
    )
    return parser


@errors.command("richhf_jax.benchmarks.steps")
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = _parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(gin_utils.rewrite_gin_args(arguments))
    json_file.check(parser, options.json)
    if min(options.batch_size, options.steps) < 1:
        parser.error("--batch_size and --steps must be at least 1")
    rows = []
    for variant in TRAIN_SLOTS if options.variant == "both" else [options.variant]:
        model = make_model(options.preset, variant, options.gin_bindings)
        rows += measure_variant(model, options.batch_size, options.steps, options.torch)
        gc.collect()  # The next variant needs the memory.
    content = {**_setting(options, cast(rahf.Rahf, model.module)), "steps": rows}
    json_file.write(options.json, content)


def _setting(options: argparse.Namespace, module: rahf.Rahf) -> dict[str, Any]:
    devices = jax.local_devices()[:1] if options.torch else jax.local_devices()
    setting = {
        "preset": options.preset,
        "gin_bindings": options.gin_bindings,
        "image_size": [side * module.vit_config.patch_size for side in module.vit_config.grid],
        "prompt_length": PROMPT_LENGTH,
        "target_length": TARGET_LENGTH,
        "dtype": str(module.t5_config.dtype),
        "device": devices[0].device_kind,
        "devices": len(devices),
        "jax": jax.__version__,
    }
    return setting | ({"torch": sys.modules["torch"].__version__} if options.torch else {})


if __name__ == "__main__":
    main()
