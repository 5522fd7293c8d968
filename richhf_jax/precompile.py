r"""Compiles the train and predict steps for TPUs that aren't there, and prints their memory and time.

    python -m richhf_jax.precompile --topology=v5e:4x4 \
        --gin_file=experiments/rich_hf_18k.gin --gin_file=partitioning/v5e_16.gin --step=both --json=plan.json

It takes the gin files of a training and reads no data. For each step it prints, and with --json writes:

- memory of each chip (parameters, optimizer, temporaries), and how much the chip has;
- FLOPs and bytes of each chip, and collectives by kind, all counted through loops;
- the shortest step time and the most images a second that the chip's peaks allow;
- how long the compilation took.

Without --topology it compiles for the devices of this machine. If a step doesn't fit, it prints the largest
buffers and exits with code 1.

With --by_part it prints, and with --json writes, how long each part of RAHF takes to compile alone: ViT,
encoder, decoder, each head and each of its convolutions.
"""

import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gin
import jax
import numpy as np
from absl import flags, logging

from richhf_jax import (
    errors,
    feature_converters,
    gin_utils,
    input_pipeline,
    keywords,
    models,
    partitioning,
    writing,
)
from richhf_jax import trainer as trainer_lib
from richhf_jax.costs import counter, parts, plan
from tasks import vocabulary

_STEPS = ("train", "predict")
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "The TPU slice to compile for: v5e:4x4, v5p:2x2x2, v6e:2x4...; default: this machine."
)
_NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "Number of slices of that topology.", lower_bound=1)
_STEP = flags.DEFINE_enum("step", "train", [*_STEPS, "both"], "The step to compile.")
_JSON = flags.DEFINE_string(
    "json", None, 'File for the numbers of the step, or {"train": ..., "predict": ...} with --step=both.'
)
_BY_PART = flags.DEFINE_bool(
    "by_part", False, "Compile each part of the model alone, and print how long that takes; plan nothing."
)

# Environment of a plan that must not use, nor wait for, a TPU of this machine.
_OFF_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",  # Don't ask Google Cloud which machine this is.
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # Don't warn that it is none. The value doesn't count.
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # Another process may use libtpu.
}
# Macros that the gin files must set; runs/train.gin and runs/eval.gin do.
_MACROS = {
    "train": ("TASK_FEATURE_LENGTHS", "BATCH_SIZE", "RANDOM_SEED", "USE_HARDWARE_RNG"),
    "predict": ("EVAL_FEATURE_LENGTHS", "EVAL_BATCH_SIZE", "CONSTRAINED_KEYWORDS"),
}
_NO_RUN = "give an experiment's gin file, for instance --gin_file=experiments/rich_hf_18k.gin"
_HOST_CHIPS = (2, 2, 1)
_EXAMPLES = "v4:2x2x4, v5e:4x4, v5p:2x2x2, v6e:2x4 (Google's names, with the sides of the slice)"
# Makes the two cores of a TPU v4 chip one device, which those of later chips are by default.
_CHIP_CONFIG = {"v4": "megacore"}


def topology_devices(name: str, num_slices: int = 1) -> Sequence[partitioning.Device]:
    """Returns the devices of TPU slices that aren't there.

    Args:
      name: topology of a slice, for instance "v5e:4x4".
      num_slices: number of slices.

    Raises:
      errors.UserError: there is no such topology; libtpu isn't installed.
    """
    parsed = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", name)
    if not parsed:
        raise errors.UserError(f"--topology={name}: no topology has such a name; write {_EXAMPLES}")
    if importlib.util.find_spec("libtpu") is None:
        raise errors.UserError("compiling for TPUs takes libtpu: pip install -e '.[tpu]'")
    from jax.experimental import topologies

    sides = [int(side) for side in parsed[2].split("x")]
    sides += [1] * (len(_HOST_CHIPS) - len(sides))
    options: dict[str, Any] = {"chips_per_host_bounds": tuple(map(min, sides, _HOST_CHIPS))}
    if parsed[1] in _CHIP_CONFIG:
        options["chip_config_name"] = _CHIP_CONFIG[parsed[1]]
    if num_slices > 1:
        options["num_slices"] = num_slices
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise errors.UserError(f"--topology={name}: {reason} (examples: {_EXAMPLES})") from error


def step_shapes(step: str) -> dict[str, np.ndarray]:
    """Makes the batch of a step, by gin's macros, of zeros that take no memory.

    Args:
      step: "train" or "predict".

    Raises:
      errors.UserError: a macro is missing, or the lengths make no sense.
    """
    lengths, batch_size = (gin_utils.macro(name) for name in _MACROS[step][:2])
    batch = feature_converters.converted_shapes(
        lengths,
        batch_size,
        variant=gin_utils.macro("VARIANT"),
        letterbox=input_pipeline.fit() == "letterbox",
    )
    marks_words = gin_utils.macro("MODEL").outputs.keywords
    if step == "predict" and marks_words and gin_utils.macro("CONSTRAINED_KEYWORDS"):
        suffix = keywords.suffix_pieces(vocabulary.get_vocabulary().encode)
        batch |= keywords.features([], batch_size, lengths["targets"], suffix)
    return batch


def plan_step(name: str, devices: Sequence[partitioning.Device] | None) -> dict[str, Any]:
    """Compiles one step of the model that gin describes.

    Args:
      name: "train" or "predict".
      devices: the devices to compile for; None: those of this machine.

    Returns:
      The plan, see `plan.make`.

    Raises:
      errors.UserError: the batch or an array doesn't split over these devices.
    """
    partitioner = gin.get_configurable(partitioning.PjitPartitioner)(devices=devices)
    batch = step_shapes(name)
    batch_images, prompts = batch["encoder_input_tokens"].shape[:2]
    partitioner.get_data_layout(batch_images)
    trainer = make_trainer(name, partitioner, batch)
    logging.info("tracing the %s step", name)
    state, lowered = trainer.abstract_state, trainer.lower(name)
    state_parts = {"parameters": state.params, "optimizer": state.opt_state if name == "train" else ()}
    more_parts = {"average": state.ema_params, "mutable collections": state.flax_mutables}
    state_parts |= {part: tree for part, tree in more_parts.items() if tree}
    step = plan.Step(
        name,
        batch_images,
        prompts,
        mesh=dict(partitioner.mesh.shape),
        device_kind=partitioner.mesh.devices.flat[0].device_kind,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        state_bytes_per_chip={part: plan.bytes_per_chip(tree) for part, tree in state_parts.items()},
        model_flops=counter.model_flops(
            trainer.lower("eval") if name == "train" else lowered, training=name == "train"
        ),
    )
    logging.info("compiling the %s step for %d x %s", name, partitioner.mesh.size, step.device_kind)
    return plan.make(step, *compile_step(lowered))


def make_trainer(
    step: str, partitioner: partitioning.PjitPartitioner, batch: Mapping[str, np.ndarray]
) -> trainer_lib.Trainer:
    """Makes the trainer in the same way as training and evaluation."""
    if step == "predict":
        return trainer_lib.Trainer(gin_utils.macro("MODEL"), partitioner, batch)
    return gin.get_configurable(trainer_lib.Trainer)(
        gin_utils.macro("MODEL"),
        partitioner,
        batch,
        random_seed=gin_utils.macro("RANDOM_SEED"),
        use_hardware_rng=gin_utils.macro("USE_HARDWARE_RNG"),
    )


def compile_step(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, float, str | None]:
    """Compiles a step.

    Returns:
      (the program, seconds that compiling took, the compiler's message if the chip's memory is too small).

    Raises:
      errors.UserError: the step is over the limit on on-chip memory, not over the main memory.
    """
    start = time.monotonic()
    try:
        return lowered.compile(), time.monotonic() - start, None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        if "ScopedVmem" in str(error):
            reason = " ".join(str(error).splitlines()[:2])
            raise errors.UserError(
                f"xla_tpu_scoped_vmem_limit_kib is too small for this step: {reason}"
            ) from error
        seconds, refusal = time.monotonic() - start, str(error).splitlines()[0]
    logging.info("the step doesn't fit; compiling it again to find what takes the memory")
    return lowered.compile(compiler_options={"xla_tpu_no_crash_on_oom": "true"}), seconds, refusal


def parts_of_step(
    step: str, devices: Sequence[partitioning.Device] | None
) -> Iterator[tuple[str, Callable[[], jax.stages.Lowered]]]:
    """Yields each part of a step, and the whole step last: its name, and a function that lowers it.

    A part has a microbatch, as within the step; a convolution has the share of one chip.

    Args:
      step: "train" or "predict".
      devices: as for `plan_step`.

    Raises:
      errors.UserError: a microbatch doesn't split over the devices.
    """
    partitioner = gin.get_configurable(partitioning.PjitPartitioner)(devices=devices)
    whole = step_shapes(step)
    trainer = make_trainer(step, partitioner, whole)
    model: Any = trainer.model
    state = trainer.abstract_state

    def lowering(fn, *args):
        return lambda: partitioner.partition(fn, None, None).lower(*args)

    def laid_out(tree, count=None, sharding=partitioner.batch_sharding):
        def leaf(x):
            shape = x.shape if count is None else (count, *x.shape[1:])
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)

        return jax.tree.map(leaf, tree)

    size = next(iter(whole.values())).shape[0] // trainer.num_microbatches
    partitioner.get_data_layout(size)
    if step == "train":
        yield "initialisation", lambda: trainer.lower("init")
        optimize = lowering(
            lambda state, grads: state.apply_gradient(
                model.optimizer_def, grads, ema_decay=trainer.ema_decay
            ),
            state,
            state.params,
        )
        yield "optimizer", optimize
    if not isinstance(model, models.RahfModel):
        raise errors.UserError("--by_part knows the parts of RAHF alone: leave it out for other models")
    for part in parts.of_network(model.module, state.params, laid_out(whole, size)):
        inputs = laid_out(part.inputs)
        yield part.name, lowering(part.fn, part.params, *inputs)
        if step == "train":
            yield f"{part.name}, with gradients", lowering(part.gradients, part.params, *inputs)
    if step == "predict":
        no_heads = {
            "heatmap_weights": whole["heatmap_weights"][:, :0],
            "score_weights": whole["score_weights"][:, :0],
        }
        yield (
            "ViT, encoder and decoding",
            lowering(model.predict_batch, state.params, laid_out(whole | no_heads)),
        )
    else:
        of_chip = laid_out(whole, size // partitioner.num_data_shards, partitioner.replicated)
        for part in parts.of_network(model.module, state.params, of_chip):
            if part.name in ("heatmap head", "score head"):
                platform = partitioner.mesh.devices.flat[0].platform
                for name, one in parts.convolutions(part, platform).items():
                    operands = laid_out(one.operands, sharding=partitioner.replicated)
                    yield f"{part.name}: {name} (x{one.count})", lowering(one.fn, *operands)
    yield f"{step} step", lambda: trainer.lower(step)


def compile_parts(step: str, devices: Sequence[partitioning.Device] | None) -> list[dict[str, Any]]:
    """Compiles and prints each part of a step: see `parts_of_step`.

    Returns:
      For each part "step", "part", "lower_seconds" (with tracing), "compile_seconds", "compile_cpu_seconds"
      of all threads, and "flops" of one chip.
    """
    rows = []
    print(f"{step:92} lower s compile s    CPU s      TFLOP")
    for name, lower in parts_of_step(step, devices):
        start = time.monotonic()
        lowered = lower()
        lower_seconds, cpu = time.monotonic() - start, time.process_time()
        compiled, seconds, _ = compile_step(lowered)
        cpu = time.process_time() - cpu
        flops = counter.analyze(compiled.as_text() or "").flops
        print(f"  {name:90} {lower_seconds:7.1f} {seconds:9.1f} {cpu:8.1f} {flops / 1e12:10.4g}", flush=True)
        row = {"step": step, "part": name, "lower_seconds": lower_seconds, "compile_seconds": seconds}
        rows.append({**row, "compile_cpu_seconds": cpu, "flops": flops})
    return rows


def _configure(steps: Sequence[str]) -> None:
    """Parses the gin files, which must describe a run."""
    # MODEL_DIR has no value in the files and isn't used here.
    flags.FLAGS.gin_bindings = ["MODEL_DIR = 'none'", *flags.FLAGS.gin_bindings]
    try:
        gin_utils.configure()
    except errors.UserError as error:
        if "--gin.MODEL_DIR" not in str(error):
            raise
        raise errors.UserError(_NO_RUN) from error
    config = gin.config_str()
    needed = ("MODEL", *(name for step in steps for name in _MACROS[step]))
    if missing := [name for name in needed if not re.search(rf"^{name} = ", config, re.MULTILINE)]:
        raise errors.UserError(f"no gin file sets {', '.join(missing)}: {_NO_RUN}")


def _write_json(content: Any) -> None:
    """Writes the file of --json, if it is given."""
    if _JSON.value:
        with writing.explained_disk_errors(_JSON.value):
            writing.write(_JSON.value, json.dumps(content, indent=2, allow_nan=False))


def main() -> None:
    """Plans the steps that the flags ask for.

    Raises:
      errors.UserError: see `plan_step`; the JSON file can't be written.
      SystemExit: with code 1, if a step doesn't fit.
    """
    steps = _STEPS if _STEP.value == "both" else (_STEP.value,)
    if _JSON.value:
        writing.check_file(_JSON.value)
    if _TOPOLOGY.value:
        os.environ.update(_OFF_TPU)
        jax.config.update("jax_platforms", "cpu")
    _configure(steps)
    devices = topology_devices(_TOPOLOGY.value, _NUM_SLICES.value) if _TOPOLOGY.value else None
    if _BY_PART.value:
        jax.config.update("jax_enable_compilation_cache", False)
        _write_json([row for step in steps for row in compile_parts(step, devices)])
        return
    plans = {}
    for step in steps:
        plans[step] = plan_step(step, devices)
        print(plan.table(plans[step]), flush=True)
    _write_json(plans if len(plans) > 1 else plans[_STEP.value])
    if any(one["fits"] is False for one in plans.values()):
        sys.exit(1)


if __name__ == "__main__":
    gin_utils.run_program(main)
