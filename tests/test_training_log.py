"""Speed, progress lines and scalars of a training."""

import functools
import os
import re
import types

import jax
import numpy as np
import pytest
from absl import logging
from tensorboard.backend.event_processing import event_accumulator

from richhf_jax import losses, models, training_log
from richhf_jax.costs import chips


class Clock:
    """Returns the times at which the steps complete."""

    def __init__(self, *times):
        self._times = iter(times)

    def __call__(self):
        return next(self._times)


def test_times_of_steps():
    timer = training_log.StepTimer(Clock(100, 103, 105, 110, 111))
    timer.add(0, 1, {})  # Compiles.
    timer.add(1, 2, {})  # The batch was there long before the device was free.
    timer.add(2, 104, {})  # The device waited for a batch.
    timer.add(107, 107.5, {})  # There was an evaluation before; then the batch came late.
    times = timer.take()
    np.testing.assert_allclose(times.seconds, [3, 2, 3])
    np.testing.assert_allclose(times.input_seconds, [0, 1, 0.5])
    timer.add(108, 109, {})
    np.testing.assert_allclose(timer.take().seconds, [1])
    timer.close()


def test_the_first_step_of_a_run_has_no_time():
    timer = training_log.StepTimer(Clock(100))
    timer.add(0, 1, {})
    assert timer.take() is None
    assert timer.take() is None
    timer.close()


def test_speed():
    seconds = np.array([1.0] * 90 + [2.0] * 9 + [12.0])
    times = training_log.StepTimes(seconds, np.where(seconds == 12, 6.0, 0.0))
    scalars = times.scalars(batch_size=24, num_devices=4, seconds_at_peak=0.3)
    assert scalars == pytest.approx(
        {
            "timing/images_per_second": 20.0,
            "timing/images_per_second_per_chip": 5.0,
            "timing/input_wait_share": 0.05,
            "timing/step_seconds_p50": 1.0,
            "timing/step_seconds_p90": 1.1,  # A tenth of the way from the 90th step to the 91st.
            "timing/step_seconds_p99": 2.1,
            "timing/model_flop_utilisation": 0.25,
        }
    )
    assert "timing/model_flop_utilisation" not in times.scalars(24, 4, None)


def test_seconds_at_the_chips_peak():
    lowered = jax.jit(lambda a, b: a @ b).lower(
        np.zeros((64, 32), np.float32), np.zeros((32, 16), np.float32)
    )
    trainer = types.SimpleNamespace(lower={"eval": lowered}.get)
    chip = types.SimpleNamespace(device_kind="TPU v5 lite")
    forward = 2 * 64 * 32 * 16
    peak = chips.spec("TPU v5 lite").peak_flops
    assert training_log.step_seconds_at_peak(trainer, [chip] * 8) == pytest.approx(3 * forward / (8 * peak))
    assert training_log.step_seconds_at_peak(trainer, jax.devices()) is None


def test_progress_lines_and_scalars(tmp_path, caplog):
    progress_metrics = functools.partial(models.RahfModel.progress_metrics, None)
    log = training_log.TrainingLog(str(tmp_path), 7, 2, 16, 2, 0.001, str, progress_metrics)
    ones = np.ones((), np.float32)
    logging.set_verbosity(logging.INFO)
    with caplog.at_level("INFO", logger="absl"):
        for step in (3, 4, 5, 6):
            cut = 0.5 * ones * (step > 4)
            metrics = {"loss": losses.WeightedMean(step * ones, ones)}
            metrics["data/encoder_words_cut"] = losses.WeightedMean(cut, ones)
            log.add(metrics, asked=0.0, ready=0.0)
            if step % 2 == 0:
                log.write(step)
    log.close()
    first, second = (r.getMessage() for r in caplog.records if r.module == "training_log")
    speed = r"\S+ steps/s  \S+ images/s  MFU \d+%"
    assert re.fullmatch(rf"step 4/7  {speed}  ETA \d+:\d\d  loss 3.5000", first)
    assert second.endswith("data/encoder_words_cut 0.5000  loss 5.5000")
    events = event_accumulator.EventAccumulator(str(tmp_path / "train")).Reload()
    tags = events.Tags()["tensors"]
    assert {"loss", "timing/steps_per_second", "timing/step_seconds_p99"} <= set(tags)
    assert [event.step for event in events.Tensors("loss")] == [4, 6]


def test_the_folders_keep_to_the_umask(tmp_path):
    before = os.umask(0o002)
    try:
        training_log.create_writer(str(tmp_path / "run"), "training_eval", "task").close()
    finally:
        os.umask(before)
    paths = (tmp_path / "run").rglob("*")
    assert {path.stat().st_mode & 0o777 for path in paths} == {0o775, 0o664}
