"""Compares the kernels of attention on this machine's first device: values, gradients, time and memory.

The shapes are those of the base size's ViT (1,024 patches) and T5 encoder (1,024 patches and 64 tokens of a
prompt, with relative positions and padding), or with --size=tiny those of the tiny size. The encoder is there
once more with logits about -200, where some versions of cuDNN returned NaN. The kernels are

    xla      products of matrices, with the padding and the positions added to the logits
    cudnn    cuDNN's flash attention; on a machine without an NVIDIA GPU the same formulas, computed by XLA

They take the same inputs in turns. Milliseconds are the median of the turns' means. Temporaries are those of
the compiled program. A difference is the largest one from "xla" in float32, as a share of the array's largest
number; padding doesn't count. The kernels agree if cudnn's differences are at most twice those of xla in the
same type: both round to that type, but not in the same places.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from richhf_jax import errors
from richhf_jax.benchmarks import json_file
from richhf_jax.network import attention_kernel, layers

KERNELS = ("xla", "cudnn")
PASSES = ("forward", "forward+backward")
# Calls in a turn of a kernel; the device is waited for at the end.
TURN = 10
# A float32 kernel other than xla has only its own order of sums.
_EXACT = 1e-5


@dataclasses.dataclass(frozen=True)
class Shape:
    """An attention of the network.

    Attributes:
      name: its place in the network.
      length: tokens, which are both queries and keys.
      padded: tokens at the end that may be padding; each example has another number of them.
      num_heads, head_dim: sizes.
      has_bias: whether there are relative positions.
      mean_bias: their mean.
    """

    name: str
    length: int
    padded: int
    num_heads: int
    head_dim: int
    has_bias: bool
    mean_bias: float = 0.0


SIZES = {
    "base": (
        Shape("ViT", 1024, 0, 12, 64, False),
        Shape("encoder", 1088, 64, 12, 64, True),
        Shape("encoder, low logits", 1088, 64, 12, 64, True, -200.0),
    ),
    "tiny": (
        Shape("ViT", 64, 0, 4, 16, False),
        Shape("encoder", 88, 24, 4, 16, True),
        Shape("encoder, low logits", 88, 24, 4, 16, True, -200.0),
    ),
}


def inputs(shape: Shape, batch_size: int, dtype: str) -> dict[str, Any]:
    """Makes random inputs: "query", "key", "value", "bias" (None without), "visible", "weights".

    "weights" [batch, length, heads, kv] are those of the outputs in the loss, 0 at padding.
    """
    rng = np.random.default_rng(0)

    def normal(*sides, scale=1.0, mean=0.0):
        return jnp.asarray(mean + scale * rng.standard_normal(sides, np.float32), dtype)

    arrays = (batch_size, shape.length, shape.num_heads, shape.head_dim)
    hidden = rng.integers(0, shape.padded + 1, (batch_size, 1))
    visible = np.arange(shape.length)[None] < shape.length - hidden
    return {
        # As in the network, logits have about variance 1.
        "query": normal(*arrays, scale=shape.head_dim**-0.5),
        "key": normal(*arrays),
        "value": normal(*arrays),
        "bias": normal(1, shape.num_heads, shape.length, shape.length, mean=shape.mean_bias)
        if shape.has_bias
        else None,
        "visible": jnp.asarray(visible),
        "weights": normal(*arrays) * jnp.asarray(visible[:, :, None, None], dtype),
    }


def attend(kernel: str, arrays: dict[str, Any], dropout_rate: float = 0.0) -> jax.Array:
    """Computes the attention with one of `KERNELS`; padding is set to 0.

    Without an NVIDIA GPU, "cudnn" stands for its formulas, computed by XLA.
    """
    query, key, value, bias, visible = (arrays[name] for name in ("query", "key", "value", "bias", "visible"))
    dropout_rng, dtype = jax.random.key(0), query.dtype
    if kernel == "xla":
        mask = layers.mask_to_bias(layers.make_attention_mask(visible, visible), dtype)
        attended = layers.dot_product_attention(
            query, key, value, layers.combine_biases(mask, bias), dropout_rng, dropout_rate, dtype=dtype
        )
    else:
        batch, kv_length, num_heads, _ = key.shape
        kept = layers.kept_weights(dropout_rng, dropout_rate, (batch, num_heads, 1, kv_length), dtype)
        implementation = "cudnn" if attention_kernel.current_device().capability else "xla"
        attended = attention_kernel.flash(
            query, key, value, bias, visible, kept if dropout_rate else None, implementation
        )
    return jnp.where(visible[:, :, None, None], attended, 0)


def _program(kernel: str, step: str, dropout_rate: float) -> Callable[[dict[str, Any]], dict[str, jax.Array]]:
    """Returns a function of the inputs: {"output": ...}, or also the gradients by the inputs' names."""

    def forward(arrays):
        return attend(kernel, arrays, dropout_rate)

    def loss(learned, others):
        output = forward(learned | others)
        return jnp.sum((output * others["weights"]).astype(jnp.float32)), output

    def forward_and_backward(arrays):
        learned = {
            name: arrays[name] for name in ("query", "key", "value", "bias") if arrays[name] is not None
        }
        others = {name: array for name, array in arrays.items() if name not in learned}
        gradients, output = jax.grad(loss, has_aux=True)(learned, others)
        return {"output": output} | gradients

    return (lambda arrays: {"output": forward(arrays)}) if step == "forward" else forward_and_backward


def compare(
    shape: Shape,
    batch_size: int = 8,
    dtype: str = "bfloat16",
    dropout_rate: float = 0.0,
    turns: int = 5,
    steps: Sequence[str] = PASSES,
) -> Iterator[dict[str, Any]]:
    """Compares the kernels on one shape.

    Args:
      shape: the attention.
      batch_size: examples.
      dtype: type of the inputs.
      dropout_rate: of the attention weights; the kernels drop the same ones.
      turns: turns of each kernel.
      steps: passes of `PASSES`.

    Yields:
      For each pass "shape", "step", "agree" (bool), and by each kernel's name "compile_seconds",
      "milliseconds", "temporary_mebibytes" and "differences" (array -> share; None: not finite), or an
      "error" in their place.
    """
    arrays = inputs(shape, batch_size, dtype)
    exact = {name: array if array is None or array.dtype == bool else array.astype(jnp.float32)
             for name, array in arrays.items()}  # fmt: skip
    for step in steps:
        with jax.default_matmul_precision("highest"):
            expected = jax.jit(_program("xla", step, dropout_rate))(exact)
        row: dict[str, Any] = {"shape": shape.name, "step": step}
        programs = {}
        for kernel in KERNELS:
            try:
                programs[kernel], row[kernel] = _compiled(kernel, step, dropout_rate, arrays)
                row[kernel]["differences"] = _differences(programs[kernel](arrays), expected)
            # What cuDNN can't do has its own errors, of several types.
            except (jax.errors.JaxRuntimeError, NotImplementedError, RuntimeError, ValueError) as error:
                programs.pop(kernel, None)
                row[kernel] = {"error": str(error).splitlines()[0]}
        row["agree"] = _agree(row, dtype)
        for kernel, milliseconds in _time(programs, arrays, turns).items():
            row[kernel]["milliseconds"] = milliseconds
        yield row


def _compiled(
    kernel: str, step: str, dropout_rate: float, arrays: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    start = time.perf_counter()
    compiled: Any = jax.jit(_program(kernel, step, dropout_rate)).lower(arrays).compile()
    seconds = time.perf_counter() - start
    temporaries = compiled.memory_analysis().temp_size_in_bytes / 2**20
    return compiled, {"compile_seconds": seconds, "temporary_mebibytes": temporaries}


def _differences(found: dict[str, jax.Array], expected: dict[str, jax.Array]) -> dict[str, float | None]:
    shares = {}
    for name, array in found.items():
        share = jnp.max(jnp.abs(array.astype(jnp.float32) - expected[name])) / jnp.max(
            jnp.abs(expected[name])
        )
        shares[name] = float(share) if jnp.isfinite(share) else None
    return shares


def _agree(row: dict[str, Any], dtype: str) -> bool:
    """Returns whether both kernels ran, and cudnn's differences are at most twice xla's."""
    if any("error" in row[kernel] for kernel in KERNELS):
        return False
    xla, cudnn = (row[kernel]["differences"] for kernel in KERNELS)
    if None in (*xla.values(), *cudnn.values()):
        return False
    least = _EXACT if dtype == "float32" else 0.0
    return all(share <= max(2 * xla[name], least) for name, share in cudnn.items())


def _time(programs: dict[str, Any], arrays: dict[str, Any], turns: int) -> dict[str, float]:
    """Returns each program's milliseconds a call: the median over the turns."""
    seconds: dict[str, list[float]] = {kernel: [] for kernel in programs}
    for _ in range(turns):
        for kernel, program in programs.items():
            start = time.perf_counter()
            for _ in range(TURN):
                result = program(arrays)
            jax.block_until_ready(result)
            seconds[kernel].append((time.perf_counter() - start) / TURN)
    return {kernel: 1000 * statistics.median(times) for kernel, times in seconds.items()}


def cudnn_is() -> str:
    """Tells what "cudnn" computes on this machine."""
    has_cudnn = attention_kernel.current_device().capability is not None
    return "cuDNN's flash attention" if has_cudnn else "its formulas, computed by XLA"


def line(row: dict[str, Any]) -> str:
    """Returns a row of `compare` as a line of text for each kernel."""
    lines = []
    for kernel in KERNELS:
        one = row[kernel]
        start = f"{row['shape']:19} {row['step']:17} {kernel:6}"
        if "error" in one:
            lines.append(f"{start} {one['error']}")
            continue
        shares = ", ".join(
            f"{name} {'not finite' if share is None else format(share, '.1e')}"
            for name, share in one["differences"].items()
        )
        lines.append(
            f"{start} {one['milliseconds']:9.3f} ms {one['temporary_mebibytes']:9.1f} MiB"
            f"  compiled in {one['compile_seconds']:.1f} s  differences: {shares}"
        )
    return "\n".join([*lines, f"{'':19} the kernels {'agree' if row['agree'] else 'DO NOT AGREE'}"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m richhf_jax.benchmarks.attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=list(SIZES), default="base", help="shapes (default base)")
    parser.add_argument("--batch_size", type=int, default=8, help="examples (default 8)")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--dropout_rate", type=float, default=0.0, help="of the weights (default 0)")
    parser.add_argument("--turns", type=int, default=5, help=f"of {TURN} calls, each kernel's (default 5)")
    json_file.add_flag(parser, ", row by row")
    return parser


@errors.command("richhf_jax.benchmarks.attention")
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Raises:
      SystemExit: with code 1, if the kernels don't agree or one can't run.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    json_file.check(parser, options.json)
    if min(options.batch_size, options.turns) < 1:
        parser.error("--batch_size and --turns must be at least 1")
    if not 0 <= options.dropout_rate < 1:
        parser.error("--dropout_rate must be from 0 to below 1")
    device = jax.local_devices()[0]
    content: dict[str, Any] = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "cudnn_is": cudnn_is(),
        "batch_size": options.batch_size,
        "dtype": options.dtype,
        "dropout_rate": options.dropout_rate,
        "rows": [],
    }
    print(", ".join(f"{name}: {value}" for name, value in content.items() if name != "rows"), flush=True)
    for shape in SIZES[options.size]:
        for row in compare(shape, options.batch_size, options.dtype, options.dropout_rate, options.turns):
            print(line(row), flush=True)
            content["rows"].append(row)
            json_file.write(options.json, content)
    if not all(row["agree"] for row in content["rows"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
