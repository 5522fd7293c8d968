"""What every job of the check uses: its turn, its size, the model, and the clock."""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from richhf_jax import feedback, models, partitioning
from richhf_jax import trainer as trainer_lib
from richhf_jax.benchmarks import steps
from richhf_jax.benchmarks.gpu_check import plan, turns
from richhf_jax.costs import chips

_CACHE_EVENTS = "/jax/compilation_cache/cache_"
# A small constant rate after a short warm-up: losses fall from the first steps on.
_LEARNING_RATE = (
    "factors = 'constant * linear_warmup'",
    "base_learning_rate = 1e-4",
    "warmup_steps = 30",
)


@dataclasses.dataclass(frozen=True)
class Context:
    """What a job gets.

    Attributes:
      turn: tells figures, and waits for the device.
      size: one of `plan.SIZES`.
      given: gin bindings for the model.
    """

    turn: turns.Turn
    size: plan.Size
    given: Sequence[str]

    @property
    def device(self) -> Any:
        return jax.local_devices()[0]

    @property
    def chip(self) -> chips.ChipSpec | None:
        return chips.spec(self.device.device_kind)

    @property
    def bindings(self) -> list[str]:
        """The model's gin bindings."""
        rate = "richhf_jax.optimizers.create_learning_rate_scheduler"
        return ["SCAN_LAYERS = True", *(f"{rate}.{line}" for line in _LEARNING_RATE), *self.given]

    def model(self, *more: str) -> models.RahfModel:
        """Makes the multi-head model, with more gin bindings."""
        return steps.make_model(self.size.preset, feedback.MULTI_HEAD, [*self.bindings, *more])

    def trainer(self, model: models.RahfModel, batch: steps.Batch) -> trainer_lib.Trainer:
        """Makes a trainer on the device."""
        partitioner = partitioning.PjitPartitioner(devices=[self.device])
        return trainer_lib.Trainer(model, partitioner, dict(batch))

    def need_gpu(self) -> None:
        """Raises turns.Skip where there is no GPU."""
        if self.device.platform != "gpu":
            raise turns.Skip("no GPU")

    def share(self, name: str, rate: float, peak: float | None) -> None:
        """Tells a rate's share of the data sheet's, if that is known."""
        if peak:
            self.turn.figure(name, rate / peak)

    @contextlib.contextmanager
    def compilation(self, name: str = "compile") -> Iterator[None]:
        """Tells the seconds of the block, and how many programs the compilation cache had or lacked."""
        events: list[str] = []

        def note(event: str, **_: Any) -> None:
            events.append(event)

        jax.monitoring.register_event_listener(note)
        begin = time.monotonic()
        yield
        span = [begin, time.monotonic()]
        found, compiled = (events.count(f"{_CACHE_EVENTS}{kind}") for kind in ("hits", "misses"))
        self.turn.figure(name, None, "s", span=span, from_cache=found, compiled=compiled)


def seconds_of(run: Callable[[], Any], count: int) -> float:
    """Measures the median seconds of `count` calls, after one that isn't counted.

    Args:
      run: returns arrays; a call ends when they are ready.
      count: number of calls.
    """
    jax.block_until_ready(run())
    seconds = []
    for _ in range(count):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)
