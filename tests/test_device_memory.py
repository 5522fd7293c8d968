"""Programs against a device's memory: real programs, and devices that say how much they have."""

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from richhf_jax import device_memory, errors, partitioning
from richhf_jax.costs import plan

# A petabyte and more, which no machine gives.
HUGE = 1 << 50
# Names of `CompiledMemoryStats`.
SIZES = [f"{part}_size_in_bytes" for part in ("argument", "temp", "output", "alias", "generated_code")]


@pytest.fixture
def memory(monkeypatch):
    """Sets the count that every device gives of its memory."""

    def give(**stats):
        monkeypatch.setattr(device_memory, "stats", lambda device: stats)

    return give


class Step:
    """A step that donates its state, [4, 5] float32 on each of two devices, and takes a batch."""

    def __init__(self):
        self.partitioner = partitioning.PjitPartitioner()
        everywhere, batch = self.partitioner.replicated, self.partitioner.batch_sharding
        self.state = jax.device_put(np.ones((4, 5), np.float32), everywhere)
        self.run = self.partitioner.partition(
            lambda state, batch: (state + batch["x"].sum(), batch["x"] * 2),
            (everywhere, batch),
            (everywhere, batch),
            donate_argnums=(0,),
        )

    def __call__(self, rows):
        batch = self.partitioner.shard_batch({"x": np.ones((rows, 10), np.float32)})
        with jax.transfer_guard("disallow"):
            self.state, doubled = self.run(self.state, batch)
        assert doubled.shape == (rows, 10)


# Bytes on a device, for 6 rows: the state, whose result takes its place, and 3 rows of 10 numbers in and out.
SIX_ROWS = 80 + 2 * 3 * 40
# A tuple of results has a table of their addresses.
TABLE = 64


def test_a_step_is_compiled_once_for_each_shape_whether_or_not_it_is_checked(memory, compiled, monkeypatch):
    counts, checks, check = [], [], device_memory.check
    monkeypatch.setattr(device_memory, "check", lambda *args: (checks.append(args), check(*args)))
    for stats in ({}, {"bytes_limit": 10**6}):
        memory(**stats)
        step = Step()
        compiled.clear()
        for rows in (6, 6, 8, 6):
            given = step.state
            step(rows)
            assert given.is_deleted()
        counts.append((len(compiled), len(checks)))
    assert counts == [(2, 0), (2, 2)]


def test_a_batch_that_does_not_fit_is_refused_with_the_numbers_and_the_state_stays(memory):
    step = Step()
    program = step.run.lower(step.state, {"x": np.ones((6, 10), np.float32)}).compile()
    needed = SIX_ROWS + plan.memory(program)["temporaries"]
    memory(bytes_limit=needed - 1)
    with pytest.raises(device_memory.OutOfMemoryError):
        step(6)
    memory(bytes_limit=needed + TABLE)
    step(6)
    with pytest.raises(device_memory.OutOfMemoryError) as refusal:
        step(500_000)
    message = str(refusal.value)
    # 250,000 rows of 40 bytes on each of two devices.
    assert message.startswith("a batch takes 19.1 MiB of a device's memory, and cpu has 0.0 MiB for it: ")
    assert "arguments 9.5 MiB, temporaries 0.0 MiB, outputs 9.5 MiB, program 0.0 MiB" in message
    assert "1 x f32[250000,10] of 9.5 MiB (" in message
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in message  # It is no GPU.
    assert not step.state.is_deleted()
    with pytest.raises(device_memory.OutOfMemoryError):
        step(500_000)  # Nor is it forgotten.


def test_arguments_that_are_there_already_are_not_counted_again(memory):
    program = jax.jit(lambda x: x + 1).lower(np.ones(1000, np.float32)).compile()
    device = jax.devices()[0]
    device_memory.check(program, device, 4000, held=4000)
    with pytest.raises(
        device_memory.OutOfMemoryError, match=r"arguments 0.0 MiB.*outputs 0.0 MiB"
    ) as refusal:
        device_memory.check(program, device, 3999, held=4000)
    assert refusal.value.needed == 4000


@pytest.mark.parametrize(
    ("stats", "limit", "in_use"),
    [
        ([{}], None, 0),
        ([{"bytes_limit": 9, "bytes_in_use": 2}, {"bytes_limit": 7, "bytes_in_use": 4}], 7, 4),
        ([{"bytes_limit": 9, "bytes_in_use": 2}, {}], None, 2),
    ],
)
def test_devices_with_counts_and_without(monkeypatch, stats, limit, in_use):
    monkeypatch.setattr(device_memory, "stats", lambda device: device)
    assert (device_memory.limit(stats), device_memory.in_use(stats)) == (limit, in_use)


def test_a_cpu_has_no_count():
    assert device_memory.stats(jax.devices()[0]) == {}


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: jnp.zeros(HUGE, jnp.int8).block_until_ready(),
        lambda: jax.device_get(jax.jit(lambda x: jnp.cumsum(jnp.broadcast_to(x, HUGE))[-1])(1.0)),
        lambda: np.ones(HUGE, np.int8),
    ],
    ids=("an array", "a program's temporaries", "the host"),
)
def test_memory_that_runs_out_ends_a_command_with_what_to_do(allocate):
    with pytest.raises(SystemExit) as end, errors.command("score"), device_memory.explained("Do less"):
        allocate()
    assert str(end.value.code).startswith("score: the memory is too small: ")
    assert str(end.value.code).endswith(". Do less")
    assert "\n" not in str(end.value.code)


@pytest.mark.parametrize(
    ("message", "is_lack"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 48318382080 bytes.", True),
        ("INTERNAL: Failed to load CUBIN: CUDA_ERROR_OUT_OF_MEMORY: out of memory", True),
        (
            "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory in memory space vmem",
            False,
        ),
        ("INTERNAL: a bug", False),
    ],
)
def test_other_failures_of_xla_pass(message, is_lack):
    expected = errors.UserError if is_lack else jax.errors.JaxRuntimeError
    with pytest.raises(expected, match=message.partition("\n")[0].rstrip(".")), device_memory.explained("-"):
        raise jax.errors.JaxRuntimeError(message)


@pytest.mark.parametrize(
    ("stats", "refused"),
    [
        (None, None),
        (types.SimpleNamespace(**dict.fromkeys(SIZES, 100)), "of a device's memory.*program 0.0 MiB$"),
    ],
)
def test_a_compiler_that_tells_less(stats, refused):
    """One tells nothing; the text of the other is no HLO."""
    program: Any = types.SimpleNamespace(memory_analysis=lambda: stats, as_text=lambda: None)
    if refused is None:
        device_memory.check(program, jax.devices()[0], 1)
    else:
        with pytest.raises(device_memory.OutOfMemoryError, match=refused):
            device_memory.check(program, jax.devices()[0], 1)


def test_a_gpu_has_a_pool():
    class Device:
        platform, device_kind = "gpu", "NVIDIA L4"

    program = jax.jit(lambda x: x + 1).lower(np.ones(1000, np.float32)).compile()
    with pytest.raises(
        device_memory.OutOfMemoryError, match="NVIDIA L4 has .*XLA_PYTHON_CLIENT_MEM_FRACTION"
    ):
        device_memory.check(program, Device(), 1)
