"""Jobs about the machine: versions, ceilings, and whether it computes the CPU's numbers."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import time
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from richhf_jax import errors, feedback, partitioning, train_state
from richhf_jax import trainer as trainer_lib
from richhf_jax.benchmarks import steps
from richhf_jax.benchmarks.gpu_check.context import Context, seconds_of
from richhf_jax.network import rahf

_PACKAGES = (
    "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax", "orbax-checkpoint", "numpy",
    "torch", "triton", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-cuda-runtime-cu12",
    "nvidia-cuda-runtime", "nvidia-cublas-cu12", "nvidia-cublas",
)  # fmt: skip
_TINY = "models/rahf_tiny.gin"
# How the tiny model runs on the device: name, type of activations, precision of products, and the difference
# that is no longer rounding. By default, products of float32 on a GPU keep 10 bits (TF32); bfloat16 has 8.
_WAYS = (
    ("float32, highest precision", "float32", "highest", 1e-4),
    ("float32, default precision", "float32", None, 3e-2),
    ("bfloat16", "bfloat16", None, 0.3),
)


def versions(check: Context) -> None:
    """Tells versions, the card and the cores."""
    turn, device = check.turn, check.device
    turn.figure("python", platform.python_version())
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            turn.figure(name, importlib.metadata.version(name))
    turn.figure("device", device.device_kind)
    with contextlib.suppress(OSError):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        turn.figure("card, driver, memory", answer.stdout.strip())
    # On a GPU these are the versions of CUDA and others that JAX was built with and runs on.
    turn.figure("JAX's platform", " ".join(device.client.platform_version.split()))
    turn.figure("cores", len(os.sched_getaffinity(0)))
    if chip := check.chip:
        turn.figure("peak by the data sheet, bfloat16", chip.peak_flops / 1e12, "TFLOP/s")
        turn.figure("memory's rate by the data sheet", chip.hbm_bandwidth / 1e9, "GB/s")


def ceilings(check: Context) -> None:
    """Measures matrix products and copies, the ceilings of everything else."""
    turn, chip, side, count = check.turn, check.chip, check.size.matrix_side, check.size.timed
    values = np.random.default_rng(0).standard_normal((side, side), np.float32)
    block = np.zeros(check.size.copied_bytes, np.uint8)
    multiply, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + np.uint8(1))
    with turn.device(), turn.quiet():
        for dtype in (jnp.bfloat16, jnp.float32):
            matrix = jax.device_put(values.astype(dtype), check.device)
            rate = 2 * side**3 / seconds_of(lambda: multiply(matrix, matrix), count)  # noqa: B023
            name = f"product of {side} x {side}, {jnp.dtype(dtype).name}"
            turn.figure(name, rate / 1e12, "TFLOP/s")
            if dtype == jnp.bfloat16:
                check.share(f"{name}, share of the data sheet's", rate, chip and chip.peak_flops)
        there = jax.device_put(block, check.device)
        rate = 2 * block.nbytes / seconds_of(lambda: copy(there), count)
        turn.figure("copy on the device, read and written", rate / 1e9, "GB/s")
        check.share("copy on the device, share of the data sheet's", rate, chip and chip.hbm_bandwidth)
        if check.device.platform == "cpu":
            return  # The device's memory is the host's.
        rate = block.nbytes / seconds_of(lambda: jax.device_put(block, check.device), 3)
        turn.figure("copy to the device", rate / 1e9, "GB/s")
        # Different arrays, because JAX keeps an array's copy on the host.
        copies = [jax.block_until_ready(copy(there)) for _ in range(3)]
        begin = time.perf_counter()
        for array in copies:
            np.asarray(array)
        turn.figure("copy from the device", 3 * block.nbytes / (time.perf_counter() - begin) / 1e9, "GB/s")


def numbers(check: Context) -> None:
    """Compares the tiny model's outputs and gradients with those that the CPU computes in float32."""
    expected = _tiny_numbers("float32", "highest", jax.local_devices(backend="cpu")[0])
    for name, dtype, precision, most in _WAYS:
        found = _tiny_numbers(dtype, precision, check.device)
        for output, value in expected.items():
            difference = float(np.abs(found[output] - value).max())
            check.turn.figure(f"{name}: largest difference of {output}", difference)
            if not difference <= most:
                raise errors.UserError(
                    f"{name}: {output} differ from the CPU's by {difference:.2g}, more than {most}"
                )


def _tiny_numbers(dtype: str, precision: str | None, device: Any) -> dict[str, np.ndarray]:
    """Returns the tiny model's scores, heatmaps and gradients of the loss, the largest of which is 1."""
    bindings = ["SCAN_LAYERS = True", *(f"{part}Config.dtype = '{dtype}'" for part in ("ViT", "T5"))]
    model = steps.make_model(_TINY, feedback.MULTI_HEAD, bindings)
    batch = dict(steps.random_batch(cast(rahf.Rahf, model.module), feedback.ALL_SLOTS, 4))
    partitioner = partitioning.PjitPartitioner(devices=[device])
    trainer = trainer_lib.Trainer(model, partitioner, batch)
    params = steps.random_params(trainer.abstract_state.params)
    gradients = jax.jit(jax.grad(lambda params, batch: model.loss_fn(params, batch, None)[0]))
    with jax.default_matmul_precision(precision) if precision else contextlib.nullcontext():
        outputs = trainer.predict(train_state.InferenceState(params), batch)
        leaves = jax.tree.leaves(jax.device_get(gradients(params, partitioner.shard_batch(batch))))
    largest = max(float(np.abs(leaf).max()) for leaf in leaves)
    return {
        "the scores": np.asarray(outputs["scores"]),
        "the heatmaps": np.asarray(outputs["heatmaps"]),
        "the gradients, by their largest number": np.concatenate([leaf.ravel() for leaf in leaves]) / largest,
    }
