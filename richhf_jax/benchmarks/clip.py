"""Measures CLIP's scores on this machine beside transformers': equal random weights, pictures and prompts.

Both get PNG files and prompts in memory, and return cosines: they decode, resample and crop the pictures, cut
the prompts into tokens, and compute in float32. They take turns. Look at the ratio: both ran in the same
minutes. The pictures have 320x256 pixels. The network has the size's layers and widths, and the small
vocabulary of tasks/.
"""

import argparse
import contextlib
import functools
import io
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import gin
import numpy as np
from PIL import Image

from richhf_jax import RahfPredictor, clip_tokens, errors, feedback, gin_utils
from richhf_jax.benchmarks import json_file
from richhf_jax.benchmarks.predict import WORDS
from richhf_jax.convert import __main__ as convert

_VOCABULARY = pathlib.Path(__file__).parents[2] / "tasks/clip_small.json"
Pairs = Sequence[tuple[bytes, str]]


def save_transformers(network: Any, tokens: clip_tokens.ClipTokens, folder: pathlib.Path) -> Any:
    """Makes transformers' model with random weights, and saves it with a vocabulary.

    Args:
      network: our `network.clip.Clip`, whose sizes are taken.
      tokens: the vocabulary.
      folder: where to.

    Returns:
      The `transformers.CLIPModel`.
    """
    import torch
    import transformers

    def sizes(tower, **more):
        return {
            "hidden_size": tower.emb_dim,
            "intermediate_size": tower.mlp_dim,
            "num_hidden_layers": tower.num_layers,
            "num_attention_heads": tower.num_heads,
            "hidden_act": "quick_gelu" if tower.quick_gelu else "gelu",
            **more,
        }

    ends = {"bos_token_id": tokens.start_id, "eos_token_id": tokens.end_id}
    text, vision = network.text_config, network.vision_config
    torch.manual_seed(0)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=sizes(text, vocab_size=tokens.size, max_position_embeddings=text.max_length, **ends),
            vision_config=sizes(
                vision, image_size=vision.grid[0] * vision.patch_size, patch_size=vision.patch_size
            ),
            projection_dim=network.projection_dim,
        )
    ).eval()
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokens.content)
    return model


def make(size: str, batch_size: int, folder: pathlib.Path) -> dict[str, Callable[[Pairs], np.ndarray]]:
    """Makes both contenders, which compute the cosines of pictures and prompts.

    Args:
      size: one of `SIZES`.
      batch_size: pictures in a batch.
      folder: an empty one, for the weights.
    """
    import torch
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    gin.clear_config()
    tokens = clip_tokens.read(_VOCABULARY)
    vocabulary = f"clip.TextConfig.vocab_size = {tokens.size}"
    gin_utils.parse_gin_flags(
        gin_utils.DEFAULT_SEARCH_PATHS, ["models/clip_score.gin", f"sizes/{size}.gin"], [vocabulary]
    )
    model, side, length = map(gin_utils.macro, ("MODEL", "IMAGE_SIDE", "TEXT_LENGTH"))
    weights, converted = folder / "weights", folder / "converted"
    theirs = save_transformers(model.module, tokens, weights)
    description = convert.describe(
        model, [str(weights)], {"image": side, "inputs": length}, None, False, gin_utils.macro("FIT")
    )
    with contextlib.redirect_stdout(None):  # It prints a table of all parameters.
        convert.convert(model, [str(weights)], str(converted), description=description)
    predictor = RahfPredictor.from_checkpoint(str(converted), batch_size=batch_size)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(weights)
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=side)

    def ours_of(pairs: Pairs) -> np.ndarray:
        found = predictor(*map(list, zip(*pairs, strict=True)))
        return np.array([prediction.scores[feedback.ALIGNMENT] for prediction in found])

    @torch.inference_mode()
    def theirs_of(pairs: Pairs) -> np.ndarray:
        cosines = []
        for begin in range(0, len(pairs), batch_size):
            files, prompts = zip(*pairs[begin : begin + batch_size], strict=True)
            images: list[Any] = [Image.open(io.BytesIO(file)) for file in files]
            tokens = tokenizer(
                list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt"
            )
            outputs = theirs(**tokens, **processor(images, return_tensors="pt"))
            cosines.append((outputs.image_embeds * outputs.text_embeds).sum(-1).numpy())
        return np.concatenate(cosines)

    return {"ours": ours_of, "transformers": theirs_of}


def make_pairs(count: int) -> list[tuple[bytes, str]]:
    """Makes pictures of coarse colours with noise, as PNG, and prompts of 4 to 12 words."""
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 226, (6, 6, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((320, 256), Image.Resampling.BICUBIC))
        noise = rng.integers(0, 30, (256, 320, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(np.minimum(smooth, 225) + noise).save(file, "PNG")
        pairs.append((file.getvalue(), " ".join(rng.choice(WORDS, rng.integers(4, 13)))))
    return pairs


def measure(size: str, batch_size: int, images: int, turns: int) -> dict[str, float]:
    """Measures a size; returns medians in images a second, and the greatest difference of two cosines."""
    pairs = make_pairs(images)
    with tempfile.TemporaryDirectory() as folder:
        contenders = make(size, batch_size, pathlib.Path(folder))
        ours, theirs = (contender(pairs) for contender in contenders.values())
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(turns):
            for name, contender in contenders.items():
                begin = time.perf_counter()
                contender(pairs)
                rates[name].append(images / (time.perf_counter() - begin))
    figures = {name: statistics.median(found) for name, found in rates.items()}
    return figures | {"largest_difference": float(np.abs(ours - theirs).max())}


SIZES = ("clip_tiny", "clip_b32", "clip_b16", "clip_l14")


@errors.command()
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m richhf_jax.benchmarks.clip",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    number = functools.partial(parser.add_argument, type=int, metavar="N")
    number("--batch-size", default=16, help="pictures in a batch; default %(default)s")
    number("--images", default=64, help="number of pictures; default %(default)s")
    number("--turns", default=5, help="number of turns; default %(default)s")
    parser.add_argument("--size", choices=SIZES, action="append", help="may be repeated; default: clip_b32")
    json_file.add_flag(parser)
    options = parser.parse_args(arguments)
    json_file.check(parser, options.json)
    if min(options.batch_size, options.images, options.turns) < 1:
        parser.error("--batch-size, --images and --turns must be at least 1")
    all_figures = {}
    for size in options.size or ["clip_b32"]:
        all_figures[size] = figures = measure(size, options.batch_size, options.images, options.turns)
        ratio = figures["ours"] / figures["transformers"]
        print(
            f"{size}: {figures['ours']:.1f} images/s, transformers {figures['transformers']:.1f}, ratio"
            f" {ratio:.2f}; cosines differ by at most {figures['largest_difference']:.1e}"
        )
    json_file.write(options.json, all_figures)


if __name__ == "__main__":
    main()
