"""The shipped sizes: every parameter, and the published models' numbers of them.

The golden files hold every parameter of a preset. To write them anew:
`UPDATE_GOLDEN=1 python -m pytest tests/muse/test_presets.py -k golden`.
"""

import functools
import math

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers

from richhf_jax import gin_utils


def network(preset, *bindings):
    gin_utils.parse_gin_flags(gin_utils.DEFAULT_SEARCH_PATHS, [f"models/{preset}.gin"], bindings)
    return gin_utils.macro("NETWORK")


def inputs(side, length):
    return (
        np.zeros((1, side, side, 3), np.uint8),
        np.zeros((1, length), np.int32),
        np.zeros((1, 5), np.float32),
    )


def variables(preset, *bindings):
    made = network(preset, *bindings)
    given = inputs(gin_utils.macro("IMAGE_SIDE"), gin_utils.macro("TEXT_LENGTH"))
    return jax.eval_shape(functools.partial(made.init, jax.random.key(0), *given))


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def published(halved):
    """Makes the published modules without values; their defaults are those of 256 pixels."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 5, "up_block_types": ("UpDecoderBlock2D",) * 5}
    sizes = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "projection_dim": 768}
    with torch.device("meta"):
        return {
            "transformer": diffusers.UVit2DModel(downsample=halved, upsample=halved),
            "vqgan": diffusers.VQModel(
                **blocks, block_out_channels=(128, 256, 256, 512, 768), layers_per_block=2,
                latent_channels=64, num_vq_embeddings=8192, mid_block_add_attention=False,
            ),
            "text": transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**sizes)),
        }  # fmt: skip


# Of the transformer, in millions: https://arxiv.org/abs/2401.01808, table 1.
@pytest.mark.parametrize(("preset", "millions"), [("amused_256", 604), ("amused_512", 608), ("muse_tiny", 2)])
def test_golden_parameters_of_the_presets(preset, millions, check_golden):
    found = variables(preset, "SCAN_LAYERS = True")
    check_golden(preset, found)
    counts = {name: count(params) for name, params in found["params"].items()}
    assert round(counts["transformer"] / 1e6) == millions
    if preset != "muse_tiny":
        counts["text"] += counts.pop("text_projection")
        theirs = published(halved=preset == "amused_512")
        assert counts == {name: module.num_parameters() for name, module in theirs.items()}


@pytest.mark.parametrize("preset", ["amused_256", "amused_512", "muse_tiny"])
def test_the_tokens_of_a_preset_fill_its_images(preset):
    made = network(preset)
    rows, columns = made.transformer_config.grid
    assert rows == columns
    assert rows * made.vqgan_config.stride == gin_utils.macro("IMAGE_SIDE")
    assert made.text_config.pad_id == made.text_config.vocab_size - 1


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("codebook_size", 512, "has 1000 codes: the transformer's codebook_size must be the same, got 512"),
        ("vocab_size", 1000, "its vocab_size more, for the mask, got 1000"),
    ],
)
def test_a_transformer_of_other_tokens_is_named(setting, value, message):
    with pytest.raises(ValueError, match=message):
        variables("muse_tiny", f"transformer.TransformerConfig.{setting} = {value}")
