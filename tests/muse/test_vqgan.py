"""The tokenizer against diffusers' `VQModel` on small random weights, and finite scalar quantisation."""

import functools
import itertools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util

from richhf_jax.convert import amused, safetensors_files
from richhf_jax.muse import vqgan

torch.set_num_threads(1)

CONFIG = vqgan.VQGANConfig(
    widths=(8, 16, 16), layers_per_block=2, latent_dim=6, code_dim=6, codebook_size=20, norm_groups=4
)


def method(network, name):
    return jax.jit(functools.partial(network.apply, method=name))


def test_tokens_and_pixels_are_those_of_diffusers(rng, tmp_path):
    torch.manual_seed(0)
    made = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16), layers_per_block=2, latent_channels=6, num_vq_embeddings=20,
        norm_num_groups=4, mid_block_add_attention=False, lookup_from_codebook=True,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    made.save_pretrained(tmp_path)
    state = safetensors_files.read_safetensors(tmp_path / "diffusion_pytorch_model.safetensors")
    names = amused.vqgan_names((8, 16, 16), 2)
    tensors = amused.tensors(state, names)
    assert set(names.values()) == set(state)
    params = traverse_util.unflatten_dict({name: t.read() for name, t in tensors.items()}, sep="/")
    network = vqgan.VQGAN(CONFIG)
    image = rng.integers(0, 256, (3, 16, 24, 3), dtype=np.uint8)
    latents = method(network, "encode")({"params": params}, image)
    found = jax.jit(network.apply)({"params": params}, image)
    with torch.no_grad():
        expected = made.encode(torch.tensor(image).permute(0, 3, 1, 2) / 255).latents
        np.testing.assert_allclose(latents, expected.permute(0, 2, 3, 1), atol=1e-4)
        _, loss, (_, _, tokens) = made.quantize(expected)
        tokens = tokens.reshape(3, 4, 6)
        np.testing.assert_array_equal(found["tokens"], tokens)
        decoded = made.decode(tokens, force_not_quantize=True, shape=(3, 4, 6, 6)).sample
    assert len(np.unique(tokens)) > 5
    pixels = method(network, "decode_tokens")({"params": params}, found["tokens"])
    np.testing.assert_allclose(pixels / 255, decoded.permute(0, 2, 3, 1), atol=1e-4)
    np.testing.assert_allclose(found["image"] / 255, pixels / 255, atol=1e-4)
    difference = jnp.mean((found["latents"] - found["vectors"]) ** 2)
    np.testing.assert_allclose(1.25 * difference, loss, rtol=1e-4)


def scalar_quantizer(*levels):
    return vqgan.FiniteScalarQuantizer(CONFIG.replace(levels=levels))


def test_the_example_of_the_scalar_quantiser():
    tokens = np.arange(6).reshape(1, 2, 3)
    vectors = scalar_quantizer(3, 2).apply({}, tokens, method="embed")
    expected = [(-1, -1), (0, -1), (1, -1), (-1, 0), (0, 0), (1, 0)]
    np.testing.assert_array_equal(vectors.reshape(6, 2), expected)


@pytest.mark.parametrize("levels", [(8, 5, 5), (2, 3)])
def test_every_token_can_be_reached_and_is_that_of_its_own_vector(levels):
    quantizer = scalar_quantizer(*levels)
    # From far below to far above, for each number.
    lines = [np.linspace(-6, 6, 61)] * len(levels)
    latents = np.array(list(itertools.product(*lines)), np.float32)[None, None]
    quantize = jax.jit(quantizer.apply)
    tokens, vectors, passed = quantize({}, latents)
    assert set(np.unique(tokens)) == set(range(np.prod(levels)))
    np.testing.assert_allclose(quantizer.apply({}, tokens, method="embed"), vectors, atol=1e-6)
    np.testing.assert_array_equal(passed, vectors)
    assert quantizer.config.num_codes == np.prod(levels)
    # Larger numbers never get lower levels, and 0 is a level's middle.
    for axis, line in enumerate(lines):
        along = np.zeros((1, 1, len(line), len(levels)), np.float32)
        along[..., axis] = line
        of_line = quantize({}, along).vectors[0, 0, :, axis]
        assert (np.diff(of_line) >= 0).all()
        assert len(np.unique(of_line)) == levels[axis]
    zeros = np.zeros((1, 1, 1, len(levels)), np.float32)
    np.testing.assert_array_equal(quantize({}, zeros).vectors, zeros)


def test_the_gradient_passes_through_rounding():
    quantizer, latent = scalar_quantizer(5), 0.3
    gradient = jax.grad(lambda x: quantizer.apply({}, x).passed.sum())(jnp.full((1, 1, 1, 1), latent))
    # Of tanh(x) * 2 * 1.001 / 2.
    np.testing.assert_allclose(gradient.item(), 1.001 * (1 - np.tanh(latent) ** 2), rtol=1e-5)


def test_gradients_of_a_codebook_reach_latents_and_vectors_apart(rng, random_values):
    network = vqgan.VectorQuantizer(CONFIG)
    latents = rng.normal(size=(1, 2, 2, 6)).astype(np.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), latents)
    params = random_values(variables["params"])

    def total(params, latents, name):
        return getattr(network.apply({"params": params}, latents), name).sum()

    for name, to_codebook, to_latents in (("vectors", True, False), ("passed", False, True)):
        gradients = jax.grad(total, argnums=(0, 1))(params, latents, name)
        assert [bool(np.any(g)) for g in jax.tree.leaves(gradients)] == [to_codebook, to_latents]


def test_recomputation_changes_no_parameter():
    image = jnp.zeros((1, 8, 8, 3), jnp.uint8)
    config = CONFIG.replace(widths=(8, 16), levels=(5, 3), layers_per_block=1)
    found = []
    for policy, recomputed in (("none", 0), ("full", 2 + 2 + 3 + 3)):
        network = vqgan.VQGAN(config.replace(remat_policy=policy))
        params = jax.eval_shape(network.init, jax.random.key(0), image)["params"]
        program = jax.make_jaxpr(network.apply)({"params": params}, image).jaxpr
        assert sum("remat" in str(equation.primitive) for equation in program.eqns) == recomputed
        found.append(params)
    assert found[0] == found[1]


def test_wrong_settings_are_named(no_shape_checks):
    image = jnp.zeros((1, 10, 8, 3), jnp.uint8)

    def init(config):
        jax.eval_shape(vqgan.VQGAN(config).init, jax.random.key(0), image)

    with pytest.raises(ValueError, match="10x8 pixels don't divide into cells of 4 pixels"):
        init(CONFIG)
    with pytest.raises(ValueError, match="3 groups do not divide 8 channels"):
        init(CONFIG.replace(norm_groups=3, widths=(8,)))
    with pytest.raises(ValueError, match="at least 2 levels"):
        init(CONFIG.replace(levels=(5, 1)))
    with pytest.raises(ValueError, match="remat_policy must be one of"):
        init(CONFIG.replace(remat_policy="some"))
