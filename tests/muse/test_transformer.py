"""The transformer against diffusers' `UVit2DModel` on small random weights."""

import functools

import diffusers
import jax
import numpy as np
import pytest
import torch
from flax import traverse_util

from richhf_jax.convert import amused, safetensors_files
from richhf_jax.muse import transformer

torch.set_num_threads(1)

SIZES = {
    "hidden_size": 24, "cond_embed_dim": 10, "micro_cond_encode_dim": 8, "micro_cond_embed_dim": 40,
    "encoder_hidden_size": 14, "vocab_size": 40, "codebook_size": 32, "in_channels": 12, "num_res_blocks": 2,
    "block_num_heads": 2, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 28,
    "sample_size": 6,
}  # fmt: skip


def theirs(downsample, conv_dim):
    torch.manual_seed(0)
    made = diffusers.UVit2DModel(
        **SIZES, block_out_channels=conv_dim, downsample=downsample, upsample=downsample
    ).eval()
    with torch.no_grad():
        # A scale of one or a norm of zeros would hide its misuse.
        for parameter in made.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return made


def config(downsample, conv_dim, **changes):
    return transformer.TransformerConfig(
        vocab_size=40, codebook_size=32, grid=(6, 6), emb_dim=24, num_layers=3, num_heads=3, mlp_dim=28,
        token_dim=12, conv_dim=conv_dim, conv_num_heads=2, num_conv_blocks=2, downsample=downsample,
        micro_condition_dim=8, **changes,
    )  # fmt: skip


@pytest.mark.parametrize(("downsample", "conv_dim"), [(True, 16), (False, 24)])
def test_logits_are_those_of_diffusers(downsample, conv_dim, rng, tmp_path):
    made = theirs(downsample, conv_dim)
    made.save_pretrained(tmp_path)
    state = safetensors_files.read_safetensors(tmp_path / "diffusion_pytorch_model.safetensors")
    names = amused.transformer_names(3, 2, downsample, conv_dim != 24)
    tensors = amused.transformer_tensors(state, names)
    assert set(names.values()) == set(state)
    params = traverse_util.unflatten_dict({name: t.read() for name, t in tensors.items()}, sep="/")
    tokens = rng.integers(0, 40, (2, 6, 4))
    states = rng.normal(size=(2, 5, 14)).astype(np.float32)
    pooled = rng.normal(size=(2, 10)).astype(np.float32)
    micro = rng.uniform(0, 512, size=(2, 5)).astype(np.float32)
    network = transformer.Transformer(config(downsample, conv_dim))
    found = jax.jit(network.apply)({"params": params}, tokens, states, pooled, micro)
    with torch.no_grad():
        expected = made(*map(torch.tensor, (tokens, states, pooled, micro)))
    np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1), atol=1e-4)
