"""Batches that fit the memory: the sizes alone, then predictor and command on devices with a count."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from richhf_jax import RahfPredictor, device_memory, errors
from richhf_jax.costs import plan
from richhf_jax.predict import __main__ as predict
from richhf_jax.predict import batch_sizes


@pytest.mark.parametrize(
    ("largest", "multiple", "sizes"),
    [(16, 1, [1, 4, 16]), (32, 1, [1, 2, 8, 32]), (10, 4, [4, 12]), (1, 2, [2])],
)
def test_a_few_sizes_of_a_batch(largest, multiple, sizes):
    assert batch_sizes.compiled_sizes(largest, multiple) == sizes


def fitted(room, images=16, multiple=1, fixed=0, largest=None, refused_above=99):
    """Fits batches of 10 bytes an image and `fixed` bytes more. Returns (text, sizes, sizes it tried)."""
    sizes, tried = batch_sizes.BatchSizes(largest, multiple), []

    def check(rows):
        tried.append(rows)
        if rows > refused_above:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM")
        if (needed := fixed + 10 * rows) > room:
            raise device_memory.OutOfMemoryError("too much", needed)

    return sizes.fit(images, room, check), sizes.sizes, tried


@pytest.mark.parametrize(
    ("kwargs", "sizes", "tried"),
    [
        ({"room": 160}, [1, 4, 16], [16]),
        ({"room": 159}, [1, 2, 8], [16, 8]),
        # Only one size is compiled in vain, however small the room is.
        ({"room": 25}, [1, 2], [16, 2]),
        # The fixed part isn't known before.
        ({"room": 100, "fixed": 30}, [1, 4], [16, 8, 4]),
        ({"room": 25, "multiple": 2}, [2], [16, 2]),
        ({"room": 60, "multiple": 3}, [3, 6], [18, 6]),
        # Few images don't take the largest batch, so it isn't compiled for them.
        ({"room": 40, "images": 3}, [1, 4, 16], [4]),
        ({"room": 39, "images": 3}, [1, 2], [4, 2]),
        ({"room": 1000, "refused_above": 5}, [1, 4], [16, 8, 4]),
    ],
)
def test_the_largest_size_that_fits_after_few_compilations(kwargs, sizes, tried):
    text, found, calls = fitted(**kwargs)
    assert (found, calls) == (sizes, tried)
    reason = "the compiler finds no memory for 16" if "refused_above" in kwargs else f"{tried[0]} need "
    assert text.startswith(f"batches of {tried[-1]} images: {reason}") == (len(tried) > 1)


@pytest.mark.parametrize("kwargs", [{"room": 9}, {"room": 159, "largest": 16}, {"room": 19, "multiple": 2}])
def test_no_smaller_size_is_left_or_wanted(kwargs):
    with pytest.raises(device_memory.OutOfMemoryError, match="too much"):
        fitted(**kwargs)


def test_a_size_that_fits_is_not_checked_again_when_batches_are_under_way():
    sizes, tried = batch_sizes.BatchSizes(None, 1), []
    sizes.fit(4, 100, tried.append)
    sizes.fit(2, 0, tried.append)
    sizes.fit(16, 100, tried.append)
    assert (tried, sizes.rows(3), sizes.rows(40)) == ([4, 16], 4, 16)
    assert sizes.fits(40)
    assert not batch_sizes.BatchSizes(None, 1).fits(1)


def test_other_errors_pass():
    def check(rows):
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        batch_sizes.BatchSizes(None, 1).fit(16, 100, check)


@pytest.fixture(scope="module")
def needed(model_dir):
    """Bytes of a device that batches of 16 and of 8 images take beside the parameters, and those of these."""
    predictor = RahfPredictor.from_checkpoint(model_dir)
    blank = predictor.prepare(np.zeros((64, 64, 3), np.uint8), "a")
    held = plan.bytes_per_chip(predictor.params)
    found: dict[Any, int] = {"held": held}
    for rows in (16, 8):
        compiled = predictor._predict.lower(predictor.state, predictor.features([blank], rows)).compile()
        found[rows] = plan.memory(compiled)["total"] - held
    assert found[8] < 0.8 * found[16]
    return found


@pytest.fixture
def free(needed, monkeypatch):
    """Sets the bytes that every device has beside the parameters."""

    def give(count):
        stats = {"bytes_limit": count + needed["held"], "bytes_in_use": needed["held"]}
        monkeypatch.setattr(device_memory, "stats", lambda device: stats)

    return give


@pytest.fixture
def score(model_dir, tmp_path, capsys):
    """Scores 19 images by the command. Returns (exit code or message, text on stderr, run's folder)."""
    (tmp_path / "images").mkdir()
    for number in range(19):
        picture = np.random.default_rng(number).integers(0, 256, (16, 12, 3), np.uint8)
        Image.fromarray(picture).save(tmp_path / f"images/{number:02}.png")

    def run(out, *arguments):
        with pytest.raises(SystemExit) as end:
            predict.main(
                [
                    *(f"--checkpoint={model_dir}", f"--out={tmp_path / out}", str(tmp_path / "images")),
                    *("--prompt=a cat", "--heatmaps=none", *arguments),
                ]
            )
        return end.value.code, capsys.readouterr().err, tmp_path / out

    return run


def read(folder):
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return [line["id"] for line in lines], np.array([list(line["scores"].values()) for line in lines])


def test_the_command_takes_the_batches_that_fit_and_says_so(score, free, needed):
    assert score("whole")[0] == 0
    free(int(needed[8] / 0.9) + 1)
    code, told, small = score("small")
    assert code == 0
    assert told.startswith("predict: batches of 8 images: 16 need ")
    names, scores = read(small)
    all_names, all_scores = read(small.parent / "whole")
    assert names == all_names == [f"{number:02}.png" for number in range(19)]
    np.testing.assert_allclose(scores, all_scores, atol=1e-5)
    assert json.loads((small / "run.json").read_text())["arguments"]["batch_size"] == 8
    # On another day there is more memory.
    free(10 * needed[16])
    code, told, _ = score("small")
    assert "batch_size was 8, now it is 16. Give the same command to continue, with --batch-size=8" in code
    assert "batches of" not in told
    assert score("small", "--batch-size=8")[0] == 0


def test_a_batch_that_the_user_chose_is_refused_with_the_numbers(score, free, needed):
    free(needed[16] - 1)
    code, _, out = score("out", "--batch-size=16")
    assert code.startswith("predict: a batch takes ")
    assert "temporaries" in code
    assert code.endswith(batch_sizes.FIX)
    assert not out.exists()
    free(needed[16])
    assert score("out", "--batch-size=16")[0] == 0


def test_memory_that_really_runs_out(score):
    code, _, _ = score("out", f"--batch-size={1 << 40}")
    assert code.startswith("predict: the memory is too small: Unable to allocate ")
    assert "A smaller batch size (--batch-size) takes less" in code


def test_a_predictor_in_python(model_dir, free, needed, caplog, monkeypatch, compiled):
    images = [np.zeros((16, 12, 3), np.uint8)] * 17
    free(int(needed[8] / 0.9) + 1)
    predictor = RahfPredictor.from_checkpoint(model_dir)
    predictor(images[0], "a cat")
    assert predictor.batch_size == 16
    compiled.clear()
    assert len(predictor(images, ["a cat"] * 17)) == 17
    assert predictor.batch_size == 8
    assert len(compiled) == 2  # For 16 images, in vain, and for 8.
    assert "batches of 8 images: 16 need" in caplog.text
    caplog.clear()
    predictor(images, ["a cat"] * 17)
    assert not caplog.text
    monkeypatch.setattr(predictor, "_predict", lambda *_: jnp.zeros(1 << 50, jnp.int8))
    with pytest.raises(errors.UserError, match=r"RESOURCE_EXHAUSTED.* \(--batch-size\) takes less"):
        predictor(images, ["a cat"] * 17)
