"""What a training run says of itself: progress lines, TensorBoard scalars, its speed, a profile.

Nothing in here makes the training loop wait for the device, but `TrainingLog.write`.
"""

import concurrent.futures
import dataclasses
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from absl import logging
from clu import metric_writers

from richhf_jax import errors
from richhf_jax import trainer as trainer_lib
from richhf_jax.costs import chips, counter


def create_writer(model_dir: str, *folders: str) -> metric_writers.MetricWriter:
    """For TensorBoard, in a folder of MODEL_DIR. Of several processes the first alone writes files."""
    return metric_writers.create_default_writer(
        os.path.join(model_dir, *folders), just_logging=jax.process_index() > 0
    )


def step_seconds_at_peak(trainer: trainer_lib.Trainer, devices: Sequence[jax.Device]) -> float | None:
    """How long a training step takes at the chips' peak, if all they computed were the model.

    This is what model FLOP utilisation compares with; see `counter.model_flops`.

    Returns:
      Seconds; None where the chip isn't known (every CPU).
    """
    chip = chips.spec(devices[0].device_kind)
    if chip is None:
        return None
    flops = counter.model_flops(trainer.lower("eval"), training=True)
    return flops / (chip.peak_flops * len(devices))


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """Steps in a row.

    Attributes:
      seconds: [steps] from when the device was free, or the batch asked for if that was later, until the
        device completed the step.
      input_seconds: [steps] how long of this there was no batch yet.
    """

    seconds: np.ndarray
    input_seconds: np.ndarray

    def scalars(self, batch_size: int, num_devices: int, seconds_at_peak: float | None) -> dict[str, float]:
        """What TensorBoard shows, by T5X's names where it has them."""
        mean = self.seconds.mean()
        found = {
            "timing/images_per_second": batch_size / mean,
            "timing/images_per_second_per_chip": batch_size / mean / num_devices,
            "timing/input_wait_share": self.input_seconds.sum() / self.seconds.sum(),
        }
        for percent in (50, 90, 99):
            found[f"timing/step_seconds_p{percent}"] = np.percentile(self.seconds, percent)
        if seconds_at_peak is not None:
            found["timing/model_flop_utilisation"] = seconds_at_peak / mean
        return {name: float(value) for name, value in found.items()}


class StepTimer:
    """Sees when the device completes each step, from a thread of its own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "step_timer")
        self._steps: list[tuple[float, float, concurrent.futures.Future[float]]] = []
        self._free: float | None = None  # Since when; None before the first step, which compiles.

    def add(self, asked: float, ready: float, metrics: trainer_lib.Metrics) -> None:
        """A step that was just dispatched.

        Args:
          asked: when the loop asked for its batch, by `time.monotonic`.
          ready: when it had it.
          metrics: the step's, on the device.
        """
        self._steps.append((asked, ready, self._thread.submit(self._completed, metrics)))

    def _completed(self, metrics: trainer_lib.Metrics) -> float:
        jax.block_until_ready(metrics)
        return self._clock()

    def take(self) -> StepTimes | None:
        """Waits for the steps added since the last time. The run's first isn't among them."""
        times = []
        for asked, ready, future in self._steps:
            done = future.result()
            if self._free is not None:
                # After an evaluation or a checkpoint the device is free long before the loop goes on.
                start = max(asked, self._free)
                times.append((done - start, max(0.0, ready - start)))
            self._free = done
        self._steps = []
        return StepTimes(*np.array(times).T) if times else None

    def close(self) -> None:
        self._thread.shutdown()


class TrainingLog:
    """Progress lines, and TensorBoard scalars under MODEL_DIR/train."""

    def __init__(
        self,
        model_dir: str,
        total_steps: int,
        first_step: int,
        batch_size: int,
        num_devices: int,
        seconds_at_peak: float | None,
        describe_step: Callable[[int], str],
        progress_metrics: Callable[[Mapping[str, float]], Mapping[str, float]] = dict,
    ):
        """Opens the writer.

        Args:
          model_dir: where the scalars go.
          total_steps: steps in all.
          first_step: steps done before this run.
          batch_size: images, of all processes.
          num_devices: of all processes.
          seconds_at_peak: see `step_seconds_at_peak`.
          describe_step: describes a step, by its number, when it goes wrong.
          progress_metrics: selects and names the metrics that a progress line shows.
        """
        self._writer = create_writer(model_dir, "train")
        self._timer = StepTimer()
        self._sizes = batch_size, num_devices, seconds_at_peak
        self._total_steps = total_steps
        self._describe_step = describe_step
        self._progress_metrics = progress_metrics
        self._metrics: list[trainer_lib.Metrics] = []
        self._since = time.monotonic(), first_step

    def add(self, metrics: trainer_lib.Metrics, asked: float, ready: float) -> None:
        """A step that was just dispatched; see `StepTimer.add`."""
        self._metrics.append(metrics)  # Still on the device.
        self._timer.add(asked, ready, metrics)

    def write(self, step: int) -> None:
        """Fetches what was added since the last time.

        Raises:
          errors.UserError: something is not finite: the loss, or the gradient, and so the state.
        """
        fetched = jax.device_get(self._metrics)
        then, since_step = self._since
        _check_finite(fetched, since_step + 1, self._describe_step)
        scalars = trainer_lib.summarize(fetched)
        times = self._timer.take()
        timing = times.scalars(*self._sizes) if times else {}
        now = time.monotonic()
        timing["timing/steps_per_second"] = rate = (step - since_step) / (now - then)
        if jax.process_index() == 0:
            remaining = round((self._total_steps - step) / rate)
            speed = "  ".join([f"{rate:.2f} steps/s", *_speed(timing)])
            shown = format_metrics(self._progress_metrics(scalars))
            logging.info(
                "step %d/%d  %s  ETA %d:%02d  %s",
                step, self._total_steps, speed, *divmod(remaining, 60), shown,
            )  # fmt: skip
        self._writer.write_scalars(step, scalars | timing)
        self._metrics, self._since = [], (now, step)

    def close(self) -> None:
        self._timer.close()
        self._writer.close()


def _check_finite(
    fetched: Sequence[trainer_lib.Metrics], first_step: int, describe_step: Callable[[int], str]
) -> None:
    for step, metrics in enumerate(fetched, first_step):
        broken = [n for n, mean in metrics.items() if not np.isfinite([mean.total, mean.weight]).all()]
        if broken:
            raise errors.UserError(
                f"{' and '.join(sorted(broken))} not finite at step {step}. {describe_step(step)}"
            )


def _speed(timing: dict[str, float]) -> list[str]:
    """What a progress line tells of `StepTimes.scalars`."""
    shown = []
    if images := timing.get("timing/images_per_second"):
        shown.append(f"{images:.1f} images/s")
    if utilisation := timing.get("timing/model_flop_utilisation"):
        shown.append(f"MFU {utilisation:.0%}")
    if (share := timing.get("timing/input_wait_share", 0)) > 0.01:
        shown.append(f"{share:.0%} waiting for data")
    return shown


def format_metrics(scalars: Mapping[str, float]) -> str:
    """Formats metrics for a line of the log."""
    return "  ".join(f"{name} {value:.4f}" for name, value in sorted(scalars.items()))


class Profiler:
    """Writes a trace of some steps to MODEL_DIR/profile, for TensorBoard's profile plugin."""

    def __init__(self, model_dir: str, profile_steps: str | None, first_step: int, total_steps: int):
        """Args:
          profile_steps: 'FIRST:LAST', counted from 1, this run's first step; None: no trace.
          first_step: steps done before this run.

        Raises:
          errors.UserError: these aren't steps of this run.
        """
        self._folder = os.path.join(model_dir, "profile")
        self._first = self._last = None
        self._running = False
        if profile_steps is None:
            return
        match = re.fullmatch(r"(\d+):(\d+)", profile_steps)
        first, last = (int(number) for number in match.groups()) if match else (0, 0)
        if not 1 <= first <= last <= total_steps - first_step:
            raise errors.UserError(
                f"--profile_steps={profile_steps}: give FIRST:LAST, such as 10:15, both of this run's"
                f" {total_steps - first_step} steps, counted from 1"
            )
        self._first, self._last = first_step + first, first_step + last

    def before(self, step: int) -> None:
        if step == self._first:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, metrics: trainer_lib.Metrics) -> None:
        if step == self._last:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Ends the trace if it runs."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            logging.info("trace of steps %d to %d: %s", self._first, self._last, self._folder)
