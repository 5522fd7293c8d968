"""The memory of devices: refuses programs that need more than there is, and explains what ran out of it."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from richhf_jax import errors
from richhf_jax.costs import counter, plan

# Number of kinds of arrays that a message lists.
_NUM_ARRAYS = 3
# A GPU's pool is a part of its memory.
_POOL = (
    ". On a GPU, JAX may take 75 % of the memory, or the part that the environment's"
    " XLA_PYTHON_CLIENT_MEM_FRACTION names"
)


class OutOfMemoryError(errors.UserError):
    """A compiled program needs more memory than a device has for it.

    Attributes:
      needed: bytes that the program needs on each device.
    """

    def __init__(self, message: str, needed: int):
        super().__init__(message)
        self.needed = needed


def stats(device: Any) -> Mapping[str, int]:
    """Returns XLA's count of a device's memory, in bytes; {} where it keeps none, as on CPUs."""
    return device.memory_stats() or {}


def limit(devices: Sequence[Any]) -> int | None:
    """Returns the bytes that programs may take on each of these devices; None if one doesn't tell."""
    limits = [found for device in devices if (found := stats(device).get("bytes_limit"))]
    return min(limits) if limits and len(limits) == len(devices) else None


def in_use(devices: Sequence[Any]) -> int:
    """Returns the bytes that arrays take now, on the device where they take most."""
    return max((stats(device).get("bytes_in_use", 0) for device in devices), default=0)


def check(compiled: jax.stages.Compiled, device: Any, there: int, held: int = 0) -> None:
    """Checks that a program's arguments, outputs, temporaries and code fit a device, if the compiler tells.

    Args:
      compiled: the program.
      device: one of the devices that it was compiled for.
      there: bytes of each device that the program may take.
      held: bytes of arguments on each device that `there` leaves out.

    Raises:
      OutOfMemoryError: they don't; the message has the numbers and the largest arrays.
    """
    try:
        memory = plan.memory(compiled)
    except NotImplementedError:
        return
    needed = memory["total"] - held
    if needed <= there:
        return
    memory["arguments"] -= held
    parts = ", ".join(f"{name} {plan.size(memory[name])}" for name in memory if name != "total")
    raise OutOfMemoryError(
        f"a batch takes {plan.size(needed)} of a device's memory, and {device.device_kind} has"
        f" {plan.size(there)} for it: {parts}{_largest_arrays(compiled.as_text())}"
        + (_POOL if device.platform == "gpu" else ""),
        needed,
    )


def _largest_arrays(text: str | None) -> str:
    """Returns a full stop and a sentence on the largest arrays of XLA's text; "" if it can't be read."""
    try:
        largest = counter.largest_buffers(text or "", _NUM_ARRAYS)
    except ValueError:
        return ""
    arrays = (f"{one.count} x {one.shape} of {plan.size(one.bytes)} ({one.made_by})" for one in largest)
    return ". The largest arrays: " + "; ".join(arrays)


def is_lack(error: BaseException) -> bool:
    """Returns whether an exception says that a device, or the host, has too little memory."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        # The on-chip memory of a TPU has a limit of its own, which no batch changes.
        return "ScopedVmem" not in str(error) and any(
            sign in str(error) for sign in ("RESOURCE_EXHAUSTED", "CUDA_ERROR_OUT_OF_MEMORY")
        )
    return isinstance(error, OutOfMemoryError | MemoryError)


@contextlib.contextmanager
def explained(fix: str) -> Iterator[None]:
    """Turns a lack of memory into a UserError that says what to do.

    Args:
      fix: a sentence about the settings that take less, without its full stop.
    """
    try:
        yield
    except (OutOfMemoryError, MemoryError, jax.errors.JaxRuntimeError) as error:
        if not is_lack(error):
            raise
        told = str(error)
        if not isinstance(error, OutOfMemoryError):
            first = told.partition("\n")[0].rstrip(".")
            told = f"the memory is too small: {first or type(error).__name__}"
        raise errors.UserError(f"{told}. {fix}") from error
