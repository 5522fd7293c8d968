"""Logs of a training run: progress lines, TensorBoard scalars, its speed, a profile.

Only `TrainingLog.write`, and the profile's last step, make the training loop wait for the device.
"""

import concurrent.futures
import dataclasses
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from clu import metric_writers
from etils import epath

from richhf_jax import errors, writing
from richhf_jax import trainer as trainer_lib
from richhf_jax.costs import chips, counter


def create_writer(model_dir: str, *folders: str) -> metric_writers.MetricWriter:
    """Makes a writer for TensorBoard in a folder of MODEL_DIR. Only process 0 writes files."""
    folder = epath.Path(model_dir).joinpath(*folders)
    if jax.process_index() == 0:
        # TensorFlow would make it, whatever the umask, without the right to write for others.
        writing.make_folder(folder)
    return metric_writers.create_default_writer(os.fspath(folder), just_logging=jax.process_index() > 0)


def step_seconds_at_peak(trainer: trainer_lib.Trainer, devices: Sequence[Any]) -> float | None:
    """Computes the time of a training step if the chips computed only the model, at their peak.

    Model FLOP utilisation is this time as a share of the real one; see `counter.model_flops`.

    Args:
      trainer: makes the step.
      devices: all `jax.Device`s of the mesh.

    Returns:
      Seconds; None for an unknown chip, such as any CPU.
    """
    chip = chips.spec(devices[0].device_kind)
    if chip is None:
        return None
    flops = counter.model_flops(trainer.lower("eval"), training=True)
    return flops / (chip.peak_flops * len(devices))


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """Times of steps in a row.

    Attributes:
      seconds: [steps] time until the device completed the step. It begins when the device was free, or, if
        that is later, when the loop asked for the batch.
      input_seconds: [steps] the part of this time in which there was no batch yet.
    """

    seconds: np.ndarray
    input_seconds: np.ndarray

    def scalars(self, batch_size: int, num_devices: int, seconds_at_peak: float | None) -> dict[str, float]:
        """Computes the scalars for TensorBoard, by T5X's names where it has them.

        Args:
          batch_size: number of images in a step.
          num_devices: number of chips.
          seconds_at_peak: see `step_seconds_at_peak`.
        """
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
    """Measures when the device completes each step, in a thread of its own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "step_timer")
        self._steps: list[tuple[float, float, concurrent.futures.Future[float]]] = []
        # When the device became free; None before the end of the first step, which compiles.
        self._free: float | None = None

    def add(self, asked: float, ready: float, metrics: trainer_lib.Metrics) -> None:
        """Adds a step that was just dispatched.

        Args:
          asked: when the loop asked for the step's batch, in seconds of `time.monotonic`.
          ready: when the loop got the batch, likewise.
          metrics: the step's metrics, on the device.
        """
        self._steps.append((asked, ready, self._thread.submit(self._completed, metrics)))

    def _completed(self, metrics: trainer_lib.Metrics) -> float:
        jax.block_until_ready(metrics)
        return self._clock()

    def take(self) -> StepTimes | None:
        """Waits for the steps added since the last call, and returns their times, without the run's first."""
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
    """Writes progress lines, and TensorBoard scalars under MODEL_DIR/train."""

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
          model_dir: MODEL_DIR.
          total_steps: number of steps, those of earlier runs included.
          first_step: number of steps done before this run.
          batch_size: number of images in a step, of all processes.
          num_devices: number of chips, of all processes.
          seconds_at_peak: see `step_seconds_at_peak`.
          describe_step: describes a step that went wrong, given its number.
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
        """Adds a step that was just dispatched; see `StepTimer.add`."""
        self._metrics.append(metrics)  # Still on the device.
        self._timer.add(asked, ready, metrics)

    def write(self, step: int) -> None:
        """Fetches and writes the metrics of the steps added since the last call.

        Raises:
          errors.UserError: a metric is not finite, such as the loss or the gradient's norm.
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
    """Selects and formats the values of `StepTimes.scalars` for a progress line."""
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
        """Parses the steps.

        Args:
          model_dir: MODEL_DIR.
          profile_steps: 'FIRST:LAST', where 1 is this run's first step; None: no trace.
          first_step: number of steps done before this run.
          total_steps: number of steps, those of earlier runs included.

        Raises:
          errors.UserError: `profile_steps` are no steps of this run.
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
        """Ends the trace if it is running."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            logging.info("trace of steps %d to %d: %s", self._first, self._last, self._folder)
