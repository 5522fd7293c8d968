"""Measures prediction on this machine: the command against the bare call, batches against single images.

The models have random parameters at 64 px: the tiny one, and one of base's widths. In turn, on equal images:

    bare            the compiled call on batches in the host's memory, until the last is done
    png, npz, none  the work of `richhf_jax.predict` after compilation: it reads PNG files and prompts,
                    computes, and writes predictions.jsonl and heatmaps in this format
    batched         `RahfPredictor` called with all images
    one by one      `RahfPredictor` called with one image after the other

Look at the ratios: all ran in the same minutes.
"""

import argparse
import itertools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Sequence

import gin
import jax
import numpy as np
import sentencepiece
import tqdm
from PIL import Image

from richhf_jax import errors, gin_utils, inputs, model_description, prompt_encoders
from richhf_jax.benchmarks import json_file, steps
from richhf_jax.predict import forward, pipeline, predictor
from richhf_jax.predict.files import HEATMAP_FORMATS, PredictionFiles

_TOKENS = 24
# The small model of tasks/, which itself imports TensorFlow.
_VOCABULARY = pathlib.Path(__file__).parents[2] / "tasks/sentencepiece_small.model"
# Words of the random prompts.
WORDS = "a drawing of one two three small large red blue green circle star square and".split()  # noqa: SIM905


def random_description(
    preset: str, bindings: Sequence[str], tokens: int = _TOKENS
) -> model_description.ModelDescription:
    """Describes a model of gin/models/, with the vocabulary shipped here.

    Args:
      preset: a gin file in gin/models/.
      bindings: gin bindings, applied after the file.
      tokens: length of prompts and texts.
    """
    gin.clear_config()
    gin_utils.parse_gin_flags(gin_utils.DEFAULT_SEARCH_PATHS, [preset], bindings)
    module = gin_utils.macro("MODEL").module
    side = module.vit_config.grid[0] * module.vit_config.patch_size
    lengths = {"image": side, "inputs": tokens, "targets": tokens}
    return model_description.ModelDescription(module, lengths, "resize", 0.5, {}, _VOCABULARY.read_bytes())


def vocabulary() -> sentencepiece.SentencePieceProcessor:
    """Loads the vocabulary shipped here."""
    return prompt_encoders.load_sentencepiece(_VOCABULARY.read_bytes())


class Case:
    """A model of random parameters, and images in a folder."""

    def __init__(
        self,
        description: model_description.ModelDescription,
        batch_size: int,
        folder: pathlib.Path,
    ):
        """Makes the model's parameters, and reads the images.

        Args:
          description: the model's description.
          batch_size: images in a batch.
          folder: has the images of `write_images` in images/; predictions go there, too.
        """
        params = steps.random_params(forward.abstract_state(description).params)
        self.predictor = predictor.RahfPredictor(description, params, batch_size)
        self._folder = folder
        self._inputs = inputs.Inputs([str(folder / "images")])
        self.pairs = [record.load() for record in self._inputs]
        size = self.predictor.batch_size
        prepared = [self.predictor.prepare(*pair) for pair in self.pairs]
        self.batches = [
            self.predictor.features(prepared[i : i + size], size) for i in range(0, len(prepared), size)
        ]
        self._numbers = itertools.count()

    def bare(self) -> float:
        """Measures the bare call, in images a second."""
        begin = time.perf_counter()
        jax.block_until_ready([self.predictor.run(features) for features in self.batches])
        return len(self.pairs) / (time.perf_counter() - begin)

    def command(self, heatmaps: str) -> float:
        """Measures the command, in images a second; `heatmaps` is one of `HEATMAP_FORMATS`."""
        out = self._folder / f"out{next(self._numbers)}"
        with PredictionFiles(str(out), {"checkpoint": "random"}, 0, heatmaps) as files:
            begin = time.perf_counter()
            records = pipeline.numbered(self._inputs, 0, len(self.pairs))
            pipeline.score(
                self.predictor, records, files, tqdm.tqdm(disable=True), pipeline.default_threads()
            )
            files.finish("benchmark")
            return len(self.pairs) / (time.perf_counter() - begin)

    def batched(self) -> float:
        """Measures one call with all images, in images a second."""
        begin = time.perf_counter()
        self.predictor(*map(list, zip(*self.pairs, strict=True)))
        return len(self.pairs) / (time.perf_counter() - begin)

    def one_by_one(self, count: int) -> float:
        """Measures a call for each of the first `count` images, in images a second."""
        begin = time.perf_counter()
        for pair in self.pairs[:count]:
            self.predictor(*pair)
        return count / (time.perf_counter() - begin)


def write_images(folder: pathlib.Path, count: int, side: int) -> None:
    """Writes pictures of blocks and noise, with a prompt of 4 to 12 words beside each."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        blocks = rng.integers(0, 230, (side // 16, side // 16, 3)).repeat(16, 0).repeat(16, 1)
        noise = rng.integers(0, 25, (side, side, 3))
        Image.fromarray((blocks + noise).astype(np.uint8)).save(folder / f"{number:05}.png")
        words = rng.choice(WORDS, rng.integers(4, 13))
        (folder / f"{number:05}.txt").write_text(" ".join(words), encoding="utf-8")


CASES = {
    "tiny, 64 px": ("models/rahf_tiny.gin", [], 512, 64),
    "base's widths, 64 px": (
        "models/rahf_base.gin",
        [
            "ViTConfig.grid = (4, 4)",
            "ViTConfig.dtype = 'float32'",
            "T5Config.dtype = 'float32'",
            "SCAN_LAYERS = True",
            "VOCABULARY = None",
        ],
        32,
        4,
    ),
}


def measure(name: str, batch_size: int, turns: int) -> dict[str, float]:
    """Measures a case; returns medians over the turns, in images a second, and ratios."""
    preset, bindings, images, single = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        description = random_description(preset, bindings)
        write_images(pathlib.Path(folder) / "images", images, description.feature_lengths["image"])
        case = Case(description, batch_size, pathlib.Path(folder))
        case.bare()
        case.one_by_one(1)
        rates = [
            (case.bare(), *map(case.command, HEATMAP_FORMATS), case.batched(), case.one_by_one(single))
            for _ in range(turns)
        ]
    names = ("bare", *HEATMAP_FORMATS, "batched", "one_by_one")
    return dict(zip(names, map(statistics.median, zip(*rates, strict=True)), strict=True))


@errors.command()
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m richhf_jax.benchmarks.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="images in a batch; default %(default)s"
    )
    parser.add_argument(
        "--turns", type=int, default=5, metavar="N", help="number of turns; default %(default)s"
    )
    parser.add_argument("--case", choices=list(CASES), action="append", help="may be repeated; default: all")
    json_file.add_flag(parser)
    options = parser.parse_args(arguments)
    json_file.check(parser, options.json)
    if min(options.batch_size, options.turns) < 1:
        parser.error("--batch-size and --turns must be at least 1")
    figures = {name: measure(name, options.batch_size, options.turns) for name in options.case or CASES}
    devices = jax.local_devices()
    print(f"{len(devices)} x {devices[0].device_kind}, batches of {options.batch_size}, images/s (/ bare)")
    names = list(next(iter(figures.values())))
    print(f"{'':22}" + "".join(f"{name.replace('_', ' '):>14}" for name in names))
    for case, found in figures.items():
        cells = [f"{found[name]:.1f} ({found[name] / found['bare']:.2f})" for name in names]
        print(f"{case:22}" + "".join(f"{cell:>14}" for cell in cells))
    json_file.write(options.json, figures)


if __name__ == "__main__":
    main()
