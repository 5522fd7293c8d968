"""Plans a compiled step: its memory on each chip and the bounds of its speed, for JSON and as a table.

plan = make(...)
print(table(plan))
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from richhf_jax.costs import chips, counter

_GIB = 2**30
# Settings that take less memory than a step that doesn't fit, by step.
LESS_MEMORY = {
    "train": "More chips, a smaller BATCH_SIZE, more NUM_MICROBATCHES, REMAT_POLICY = 'full', or parameters"
    " split over chips (gin/partitioning/) take less",
    "predict": "A smaller EVAL_BATCH_SIZE, or parameters split over chips (gin/partitioning/), take less",
}


@dataclasses.dataclass(frozen=True)
class Step:
    """A step before it is compiled.

    Attributes:
      name: "train" or "predict".
      batch_images: images in a batch, for all chips together.
      prompts_per_image: prompts that are encoded for each image.
      mesh: size of each mesh axis.
      device_kind: jax's name of the device.
      parameters: number of parameters.
      state_bytes_per_chip: {"parameters", "optimizer"} -> bytes; "average", where training keeps one of the
        parameters.
      model_flops: FLOPs of the model's mathematics for a batch, without recomputation.
    """

    name: str
    batch_images: int
    prompts_per_image: int
    mesh: Mapping[str, int]
    device_kind: str
    parameters: int
    state_bytes_per_chip: Mapping[str, int]
    model_flops: float


def bytes_per_chip(tree: Any) -> int:
    """Returns the bytes that each device holds of a tree of arrays or `ShapeDtypeStruct`s with shardings."""
    leaves = jax.tree.leaves(tree)
    sizes = (jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in leaves)
    return sum(size.size * size.dtype.itemsize for size in sizes)


def make(
    step: Step, compiled: jax.stages.Compiled, compile_seconds: float, refusal: str | None = None
) -> dict[str, Any]:
    """Makes the plan of a compiled step, ready for JSON.

    Args:
      step: the step before it is compiled.
      compiled: the compiled step.
      compile_seconds: duration of the compilation.
      refusal: the compiler's message, if it refused the program for its memory and had to be forced.

    Returns:
      The plan; docs/accelerators.md, section Memory plan, explains each entry. Bytes, "flops_per_chip" and
      collectives are those of one chip and one step. "fits" and the roofline are None for an unknown chip.

    Raises:
      NotImplementedError: the backend's compiler doesn't tell the memory of a program.
    """
    chip = chips.spec(step.device_kind)
    num_chips = math.prod(step.mesh.values())
    text = compiled.as_text() or ""
    costs = counter.analyze(text)
    taken = memory(compiled)
    fits = None if chip is None else refusal is None and taken["total"] <= chip.hbm_bytes
    made = {
        "step": step.name,
        "chips": num_chips,
        "chip": chip.name if chip else step.device_kind,
        "mesh": dict(step.mesh),
        "batch_images": step.batch_images,
        "prompts_per_image": step.prompts_per_image,
        "parameters": step.parameters,
        "hbm_bytes_per_chip": chip.hbm_bytes if chip else None,
        "bytes_per_chip": {**step.state_bytes_per_chip, **taken},
        "fits": fits,
        "flops_per_chip": costs.flops,
        "flops_per_image": costs.flops * num_chips / step.batch_images,
        "model_flops_per_image": step.model_flops / step.batch_images,
        "bytes_accessed_per_chip": costs.bytes_accessed,
        "collectives": {kind: dataclasses.asdict(one) for kind, one in sorted(costs.collectives.items())},
        "uncounted_loops": list(costs.uncounted_loops),
        "roofline": _roofline(costs, chip, step.batch_images) if chip else None,
        "compile_seconds": compile_seconds,
    }
    if fits is False:
        made["refusal"] = refusal
        made["largest_buffers"] = [dataclasses.asdict(one) for one in counter.largest_buffers(text)]
    return made


def memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Returns the bytes of each chip that a program takes.

    Returns:
      "arguments", "temporaries", "outputs" beside those that take the place of a donated argument, "program"
      and their "total".

    Raises:
      NotImplementedError: the backend's compiler doesn't tell.
    """
    stats = compiled.memory_analysis()
    if stats is None:
        raise NotImplementedError("the compiler of this backend doesn't say how much memory a program takes")
    parts = {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "program": stats.generated_code_size_in_bytes,
    }
    return {**parts, "total": sum(parts.values())}


def _roofline(costs: counter.Costs, chip: chips.ChipSpec, batch_images: int) -> dict[str, float]:
    """Returns the least seconds of a step, if all parts of a chip work at their peak at the same time."""
    sent = sum(collective.sent_bytes for collective in costs.collectives.values())
    seconds = {
        "compute": costs.flops / chip.peak_flops,
        "memory": costs.bytes_accessed / chip.hbm_bandwidth,
        "interconnect": sent / chip.ici_bandwidth,
    }
    step = max(seconds.values())
    return {**seconds, "step": step, "images_per_second": batch_images / step}


def table(plan: Mapping[str, Any]) -> str:
    """Formats a plan as text."""
    axes = ", ".join(f"{name} {size}" for name, size in plan["mesh"].items())
    lines = [
        f"{plan['step']} step of {plan['batch_images']} images ({plan['prompts_per_image']} prompts each) on"
        f" {plan['chips']} x {plan['chip']} ({axes}), compiled in {plan['compile_seconds']:.0f} s",
        f"{plan['parameters']:,} parameters",
        *_memory_lines(plan),
        "Compute",
        _line("FLOPs a chip", _scaled(plan["flops_per_chip"])),
        _line("FLOPs an image, recomputation included", _scaled(plan["flops_per_image"])),
        _line("FLOPs an image, of the model alone", _scaled(plan["model_flops_per_image"])),
        _line("bytes accessed a chip", _scaled(plan["bytes_accessed_per_chip"])),
    ]
    if plan["uncounted_loops"]:
        names = ", ".join(plan["uncounted_loops"])
        lines.append(f"  loops counted once, because their number of trips is unknown: {names}")
    lines.append("Collectives a chip, a step" if plan["collectives"] else "No collectives")
    for kind, one in plan["collectives"].items():
        lines.append(_line(f"{kind} x {one['count']:,}", _size(one["bytes"])))
    return "\n".join([*lines, *_roofline_lines(plan)])


def _memory_lines(plan: Mapping[str, Any]) -> list[str]:
    memory, available = plan["bytes_per_chip"], plan["hbm_bytes_per_chip"]
    average = memory.get("average", 0)
    rest = memory["arguments"] - memory["parameters"] - memory["optimizer"] - average
    lines = [
        "Memory a chip",
        _line("parameters", _size(memory["parameters"])),
        _line("optimizer state", _size(memory["optimizer"])),
        *([_line("average of the parameters", _size(average))] if average else []),
        _line("batch and other arguments", _size(rest)),
        _line("temporaries", _size(memory["temporaries"])),
        _line("outputs beside donated arguments", _size(memory["outputs"])),
        _line("program", _size(memory["program"])),
        _line("total", _size(memory["total"])),
    ]
    if available is None:
        return [*lines, f"  the memory of {plan['chip']} isn't known here: no verdict"]
    lines.append(_line("available", _size(available)))
    if plan["fits"]:
        return [*lines, "  It fits."]
    lines.append("  IT DOES NOT FIT. " + (plan["refusal"] or ""))
    lines.append("Largest buffers (not all at once)")
    for one in plan["largest_buffers"]:
        lines.append(f"  {_size(one['bytes'])}  {one['count']:3} x {one['shape']}  {one['made_by']}")
    return [*lines, LESS_MEMORY[plan["step"]] + "."]


def _roofline_lines(plan: Mapping[str, Any]) -> list[str]:
    roofline = plan["roofline"]
    if roofline is None:
        return [f"No roofline: the speed of {plan['chip']} isn't known here"]
    parts = ("compute", "memory", "interconnect")
    return [
        "Roofline: a step takes at least",
        *(_line(part, f"{1e3 * roofline[part]:10.4g} ms") for part in parts),
        _line("the longest of these", f"{1e3 * roofline['step']:10.4g} ms"),
        _line("images a second, at most", f"{roofline['images_per_second']:10.1f}"),
    ]


def _line(name: str, value: str) -> str:
    return f"  {name:40}{value}"


def size(count: float) -> str:
    """Formats a number of bytes."""
    return f"{count / 2**20:.1f} MiB" if count < _GIB else f"{count / _GIB:.2f} GiB"


def _size(count: float) -> str:
    return f"{size(count):>14}"


def _scaled(number: float) -> str:
    for unit, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M")):
        if number >= unit:
            return f"{number / unit:10.3f}{letter}"
    return f"{number:10,.0f}"
