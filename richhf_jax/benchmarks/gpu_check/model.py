"""Jobs about the model's steps: ours, PyTorch's, and attention's kernels."""

import os
import statistics
from collections.abc import Mapping, Sequence
from typing import cast

import jax

from richhf_jax import device_memory, errors, feedback
from richhf_jax.benchmarks import attention as attention_benchmark
from richhf_jax.benchmarks import steps
from richhf_jax.benchmarks.gpu_check import plan, turns
from richhf_jax.benchmarks.gpu_check.context import Context
from richhf_jax.network import rahf


def step(check: Context, name: str, batch_size: int, way: str = "") -> None:
    """Compiles a step and measures it.

    Args:
      check: what every job gets.
      name: "train" or "predict".
      batch_size: images a step.
      way: one of `plan.WAYS`; "": the model's own.
    """
    turn = check.turn
    if way:
        check.need_gpu()
    ours, batch = compiled(check, name, batch_size, *plan.WAYS.get(way, ([], {})))
    check_room(check, ours)
    with turn.device():
        with turn.span("initialise"):
            ours.initialise()
        with turn.quiet():
            seconds = steps.measure({"jax": ours}, batch, check.size.timed)["jax"]
    rate = batch_size / statistics.median(seconds)
    turn.figure("images a second", rate, "images/s", against=f"{name}-{batch_size}" if way else None)
    check.share("share of the peak", rate * ours.flops_per_image, check.chip and check.chip.peak_flops)
    milliseconds = [1000 * function(seconds) for function in (statistics.median, min, max)]
    for which, value in zip(("median", "least", "most"), milliseconds, strict=True):
        turn.figure(f"a step, {which}", value, "ms")
    turn.figure("model FLOPs an image", ours.flops_per_image / 1e12, "TFLOP")
    if memory := check.device.memory_stats():
        turn.figure("memory in use at most", memory["peak_bytes_in_use"] / 2**30, "GiB")


def compiled(
    check: Context,
    name: str,
    batch_size: int,
    bindings: Sequence[str] = (),
    options: Mapping[str, str | bool] | None = None,
) -> tuple[steps.OurSteps, steps.Batch]:
    """Lowers and compiles a step, with XLA's options, and then once more, from JAX's compilation cache."""
    model = check.model(*bindings)
    ours = steps.OurSteps(model, [check.device], options)
    batch = steps.random_batch(cast(rahf.Rahf, model.module), feedback.ALL_SLOTS, batch_size)
    with check.turn.span("lower"):
        ours.lower(name, batch)
    with check.compilation():
        ours.compile()
    ours.count_flops()
    jax.clear_caches()
    with check.turn.span("lower again"):
        ours.lower(name, batch)
    with check.compilation("compile again, from the cache"):
        ours.compile()
    return ours, batch


def check_room(check: Context, ours: steps.OurSteps) -> None:
    """Tells the memory that the compiled step takes, and refuses it if the device has less."""
    needed = ours.peak_bytes()
    check.turn.figure("memory by the compiler's count", needed / 2**30, "GiB")
    check.turn.figure("temporaries among it", ours.temporary_bytes() / 2**30, "GiB")
    room = device_memory.limit([check.device])
    if room and needed > room:
        raise turns.Skip(f"it takes {needed / 2**30:.1f} GiB, and the device has {room / 2**30:.1f}")


def torch_step(check: Context, name: str, batch_size: int) -> None:
    """Measures the same step in PyTorch."""
    try:
        from torch_twin import steps as twin_steps
    except ModuleNotFoundError as error:
        raise turns.Skip(str(error)) from error
    module = cast(rahf.Rahf, check.model().module)
    theirs = twin_steps.TorchSteps(module, steps.PROMPT_LENGTH, steps.TARGET_LENGTH)
    batch = steps.random_batch(module, feedback.ALL_SLOTS, batch_size)
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        check.turn.figure("torch.compile", "off, so the ratio says nothing")
    with check.turn.device():
        with check.turn.span("compile and run the first step"):
            theirs.prepare(name, batch)
        with check.turn.quiet():
            seconds = steps.measure({"torch": theirs}, batch, check.size.timed)["torch"]
    rate = batch_size / statistics.median(seconds)
    check.turn.figure("images a second", rate, "images/s", against=f"{name}-{batch_size}")
    if (peak := theirs.peak_bytes()) is not None:
        check.turn.figure("memory in use at most", peak / 2**30, "GiB")


def attention(check: Context) -> None:
    """Compares attention's kernels, and tells the lines of their benchmark."""
    agree = True
    check.turn.figure("cudnn is", attention_benchmark.cudnn_is())
    with check.turn.device(), check.turn.quiet():
        for shape in attention_benchmark.SIZES[check.size.name]:
            for row in attention_benchmark.compare(shape):
                for line in attention_benchmark.line(row).splitlines():
                    check.turn.figure("printed", line)
                agree &= row["agree"]
    if not agree:
        raise errors.UserError("attention's kernels do not agree")
