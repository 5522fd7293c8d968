"""The transformer against diffusers' `UVit2DModel` on small random weights."""

import functools
import re

import diffusers
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util

from richhf_jax.convert import amused, layers, safetensors_files
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
        micro_condition_dim=8,
    ).replace(**changes)  # fmt: skip


# Of one layer a stack, which compiles faster.
SHALLOW = config(False, 24, num_layers=1, num_conv_blocks=1)


@pytest.mark.parametrize(("downsample", "conv_dim", "scanned"), [(True, 16, True), (False, 24, False)])
def test_logits_are_those_of_diffusers(downsample, conv_dim, scanned, rng, tmp_path):
    made = theirs(downsample, conv_dim)
    made.save_pretrained(tmp_path)
    state = safetensors_files.read_safetensors(tmp_path / "diffusion_pytorch_model.safetensors")
    names = amused.transformer_names(3, 2, downsample, conv_dim != 24)
    tensors = amused.tensors(state, names)
    assert set(names.values()) == set(state)
    params = traverse_util.unflatten_dict({name: t.read() for name, t in tensors.items()}, sep="/")
    tokens = rng.integers(0, 40, (2, 6, 4))
    states = rng.normal(size=(2, 5, 14)).astype(np.float32)
    pooled = rng.normal(size=(2, 10)).astype(np.float32)
    micro = rng.uniform(0, 512, size=(2, 5)).astype(np.float32)
    cfg = config(downsample, conv_dim)
    if scanned:
        params = layers.stack_layers(params)
        cfg = cfg.replace(scan_layers=True, remat_policy="full")
    network = transformer.Transformer(cfg)
    assert jax.tree.map(np.shape, params) == shapes_of(network, tokens, states, pooled, micro)
    found = jax.jit(network.apply)({"params": params}, tokens, states, pooled, micro)
    with torch.no_grad():
        expected = made(*map(torch.tensor, (tokens, states, pooled, micro)))
    np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1), atol=1e-4)


def inputs(rng):
    return (
        rng.integers(0, 40, (2, 4, 2)),
        rng.normal(size=(2, 3, 14)).astype(np.float32),
        rng.normal(size=(2, 10)).astype(np.float32),
        rng.uniform(0, 512, size=(2, 5)).astype(np.float32),
    )


def shapes_of(network, *given):
    return jax.tree.map(np.shape, shapes(network, given))


def shapes(network, given):
    return jax.eval_shape(network.init, jax.random.key(0), *given)["params"]


def test_bfloat16_is_for_activations_alone(rng):
    given = inputs(rng)
    network = transformer.Transformer(SHALLOW.replace(dtype="bfloat16"))
    params = shapes(network, given)
    assert params == shapes(transformer.Transformer(SHALLOW), given)
    program = str(jax.make_jaxpr(network.apply)({"params": params}, *given))
    products = re.findall(r":(\w+)\[[\d,]*\] = (?:dot_general|conv_general_dilated)\[", program)
    # The last ones are the logits.
    assert products == ["bf16"] * (len(products) - 1) + ["f32"]
    attention = 6
    assert len(products) == 2 * (4 + 2 * attention) + (3 + 2 * attention + 3) + 8


def test_dropout_is_for_training_alone(rng):
    network = transformer.Transformer(SHALLOW.replace(dropout_rate=0.5))
    given = inputs(rng)
    params = {"params": shapes(network, given)}
    jax.eval_shape(network.apply, params, *given)  # Without a key.
    training = functools.partial(network.apply, deterministic=False)
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        jax.eval_shape(training, params, *given)
    program = jax.make_jaxpr(training)(params, *given, rngs={"dropout": jax.random.key(0)})
    # A convolutional block's output and its attentions; the layer's attentions and its hidden layer.
    assert len(re.findall(r"jit\[\s*name=_bernoulli", str(program))) == 2 * 3 + 3


def test_a_new_norm_is_not_changed_by_its_condition(rng):
    x, condition = rng.normal(size=(2, 3, 8)), rng.normal(size=(2, 5))
    norm = transformer.AdaptiveNorm(SHALLOW)
    output, variables = norm.init_with_output(jax.random.key(0), x, condition)
    np.testing.assert_array_equal(output, norm.apply(variables, x, -condition))
    np.testing.assert_allclose(jnp.mean(jnp.square(output), axis=-1), np.ones((2, 3)), rtol=1e-3)


def test_wrong_sizes_are_named(no_shape_checks, rng):
    tokens, *rest = inputs(rng)
    with pytest.raises(ValueError, match="3 heads do not divide the width 16"):
        shapes(transformer.Transformer(config(False, 16).replace(conv_num_heads=3)), (tokens, *rest))
    with pytest.raises(ValueError, match="does not divide into 2x2 patches"):
        shapes(transformer.Transformer(config(True, 16)), (tokens[:, :3], *rest))
