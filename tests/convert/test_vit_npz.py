"""Compares .npz of the vision_transformer and big_vision line with a ViT of flax's own layers."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from richhf_jax.convert import vit_npz
from richhf_jax.convert.source import ConvertError
from richhf_jax.network import vit

CONFIG = vit.ViTConfig(patch_size=4, grid=(3, 3), emb_dim=12, num_layers=2, num_heads=3, mlp_dim=20)
WITH_TOKEN = CONFIG.replace(class_token=True)
# In their old numbering, all parts of a layer stand in one row.
OLD_NUMBERS = {"MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1"}
OLD_NUMBERS |= {"LayerNorm_1": "LayerNorm_2", "MlpBlock_0": "MlpBlock_3"}


class MlpBlock(nn.Module):
    approximate: bool

    @nn.compact
    def __call__(self, x):
        hidden = nn.gelu(nn.Dense(CONFIG.mlp_dim)(x), approximate=self.approximate)
        return nn.Dense(x.shape[-1])(hidden)


class Layer(nn.Module):
    """A layer named by flax: LayerNorm_0, MultiHeadDotProductAttention_0, LayerNorm_1, MlpBlock_0."""

    approximate: bool

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x += nn.MultiHeadDotProductAttention(num_heads=CONFIG.num_heads)(y, y)
        return x + MlpBlock(self.approximate)(nn.LayerNorm()(x))


class Encoder(nn.Module):
    positions: bool
    approximate: bool

    @nn.compact
    def __call__(self, x):
        if self.positions:
            x += self.param("pos_embedding", nn.initializers.normal(), (1, *x.shape[1:]))
        for i in range(CONFIG.num_layers):
            x = Layer(self.approximate, name=f"encoderblock_{i}")(x)
        return nn.LayerNorm(name="encoder_norm")(x)


class TheirViT(nn.Module):
    """`layout` "old": the token, then positions for it and the patches. "new": positions for the patches,
    then the token. "gap": no token."""

    layout: str
    approximate: bool = False

    @nn.compact
    def __call__(self, images):
        p, width = CONFIG.patch_size, CONFIG.emb_dim
        x = nn.Conv(width, (p, p), strides=(p, p), padding="VALID", name="embedding")(images)
        x = x.reshape(x.shape[0], -1, width)
        if self.layout != "old":
            x += self.param("pos_embedding", nn.initializers.normal(), (1, *x.shape[1:]))
        if self.layout != "gap":
            token = self.param("cls", nn.initializers.normal(), (1, 1, width))
            x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
        x = Encoder(self.layout == "old", self.approximate, name="Transformer")(x)
        # The classifier's parameters are then in the file.
        self.param("head", lambda rng: {"kernel": jnp.ones((width, 5)), "bias": jnp.ones(5)})
        return x


@pytest.fixture
def images(rng):
    return rng.standard_normal((2, 12, 12, 3)).astype(np.float32)


@pytest.fixture
def their_params(random_values, images):
    def make(layout):
        return random_values(jax.eval_shape(TheirViT(layout).init, jax.random.key(0), images)["params"])

    return make


def flat(params):
    return traverse_util.flatten_dict(params, sep="/")


def read(path):
    """Returns our ViT's parameters, and the unused names."""
    source = vit_npz.open_vit_npz(str(path))
    arrays = {name.removeprefix("vit/"): t.read() for name, t in source.tensors.items()}
    for name, tensor in source.tensors.items():
        assert (tensor.shape, tensor.dtype) == (arrays[name.removeprefix("vit/")].shape, np.float32)
    return traverse_util.unflatten_dict(arrays, sep="/"), sorted(source.unused)


def run(config, params, images):
    return jax.jit(functools.partial(vit.ViT(config).apply, deterministic=True))({"params": params}, images)


@pytest.mark.parametrize("layout", ["old", "new", "gap"])
def test_our_vit_computes_what_theirs_does(layout, their_params, images, tmp_path):
    params = their_params(layout)
    np.savez(tmp_path / "vit.npz", **flat(params))
    ours, unused = read(tmp_path / "vit.npz")
    states = run(CONFIG if layout == "gap" else WITH_TOKEN, ours, images)
    expected = np.array(jax.jit(TheirViT(layout).apply)({"params": params}, images))
    np.testing.assert_allclose(states, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert unused == ["head/bias", "head/kernel"]


def test_the_tanh_gelu_they_trained_with_differs_a_little(their_params, images, tmp_path):
    """The two functions differ by at most 5e-4."""
    params = their_params("gap")
    np.savez(tmp_path / "vit.npz", **flat(params))
    states = run(CONFIG, read(tmp_path / "vit.npz")[0], images)
    expected = jax.jit(TheirViT("gap", approximate=True).apply)({"params": params}, images)
    difference = np.abs(states - expected).max() / np.abs(expected).max()
    assert 1e-5 < difference < 2e-3
    source = vit_npz.open_vit_npz(str(tmp_path / "vit.npz"))
    assert source.settings["vit_config.approximate_gelu"]
    exact = run(CONFIG.replace(approximate_gelu=True), read(tmp_path / "vit.npz")[0], images)
    np.testing.assert_allclose(exact, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def old_names(arrays):
    """The files of augreg number parts in one row and have the position table in a module of its own."""
    renamed = {}
    for name, array in arrays.items():
        parts = [OLD_NUMBERS.get(part, part) for part in name.split("/")]
        if parts[-1] == "pos_embedding":
            parts.insert(-1, "posembed_input")
        renamed["/".join(parts)] = array
    return renamed


def stacked(arrays):
    """big_vision saves a model with `scan` like this."""
    layers = [n.removeprefix("Transformer/encoderblock_0/") for n in arrays if "encoderblock_0" in n]
    result = {name: array for name, array in arrays.items() if "encoderblock" not in name}
    for name in layers:
        each = [arrays[f"Transformer/encoderblock_{i}/{name}"] for i in range(CONFIG.num_layers)]
        result[f"Transformer/encoderblock/{name}"] = np.stack(each)
    return result


def prefixed(prefix, arrays):
    return {prefix + name: array for name, array in arrays.items()}


VARIANTS = {
    "augreg": (old_names, ""),
    "params": (lambda arrays: prefixed("params/", arrays), "params/"),
    "optimizer": (
        lambda arrays: prefixed("opt/target/", arrays) | {"opt/state/step": np.zeros(())},
        "opt/target/",
    ),
    "two towers": (lambda arrays: prefixed("params/img/", arrays), "params/img/"),
    "scanned": (stacked, ""),
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_names_of_other_times(variant, compressed, their_params, tmp_path):
    arrays = flat(their_params("old"))
    np.savez(tmp_path / "plain.npz", **arrays)
    change, prefix = VARIANTS[variant]
    (np.savez_compressed if compressed else np.savez)(tmp_path / "other.npz", **change(arrays))
    expected, _ = read(tmp_path / "plain.npz")
    ours, unused = read(tmp_path / "other.npz")
    jax.tree.map(np.testing.assert_array_equal, ours, expected)
    assert unused == [f"{prefix}head/bias", f"{prefix}head/kernel"]
    named = (
        "without 1 arrays of the optimizer" in vit_npz.open_vit_npz(str(tmp_path / "other.npz")).description
    )
    assert named == (variant == "optimizer")


def test_bfloat16_as_numpy_saves_it(their_params, tmp_path):
    arrays = {name: np.asarray(a, ml_dtypes.bfloat16) for name, a in flat(their_params("gap")).items()}
    np.savez(tmp_path / "vit.npz", **arrays)
    tensor = vit_npz.open_vit_npz(str(tmp_path / "vit.npz")).tensors["vit/patch_embedding/kernel"]
    assert tensor.dtype == tensor.read().dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(tensor.read(), arrays["embedding/kernel"])


def test_settings(their_params, tmp_path):
    np.savez(tmp_path / "vit.npz", **flat(their_params("gap")))
    settings = vit_npz.open_vit_npz(str(tmp_path / "vit.npz")).settings
    assert settings == {
        "vit_config.num_heads": 3,
        "vit_config.layer_norm_epsilon": CONFIG.layer_norm_epsilon,
        "vit_config.approximate_gelu": True,
    }


@pytest.fixture
def file(their_params, tmp_path):
    np.savez(tmp_path / "vit.npz", **flat(their_params("old")))
    return tmp_path / "vit.npz"


def test_a_truncated_file_is_named(file):
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ConvertError, match="vit.npz is truncated, or no .npz"):
        vit_npz.open_vit_npz(str(file))


def test_a_damaged_array_is_named(file):
    tensor = vit_npz.open_vit_npz(str(file)).tensors["vit/patch_embedding/kernel"]
    content = bytearray(file.read_bytes())
    content[content.find(tensor.read().tobytes())] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConvertError, match="vit.npz is damaged at embedding/kernel.npy: .*CRC"):
        tensor.read()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"weights": np.ones(2)}, r"vit.npz holds no ViT .* 1 arrays \(weights ...\)"),
        (lambda a: a | {"Transformer/pos_embedding": np.ones((1, 12, 12))}, "has 12 rows: neither a square"),
        (
            lambda a: {name: x for name, x in a.items() if "encoderblock_1/LayerNorm_0" not in name},
            "vit.npz is no whole ViT: it lacks 'LayerNorm_0/scale'",
        ),
        (
            lambda a: {name: x for name, x in a.items() if "pos_embedding" not in name},
            "vit.npz is no whole ViT: it lacks 'pos_embedding'",
        ),
        (
            lambda a: {name: x for name, x in a.items() if "encoderblock_0" not in name},
            "vit.npz is no whole ViT: it lacks 'encoderblock_0'",
        ),
        (
            lambda a: {name: x for name, x in a.items() if "encoderblock" not in name},
            "vit.npz is no whole ViT: it lacks 'encoderblock_0'",
        ),
    ],
)
def test_another_file_is_named(change, message, file):
    with np.load(file) as archive:
        arrays = dict(archive)
    np.savez(file, **change(arrays))
    with pytest.raises(ConvertError, match=message):
        vit_npz.open_vit_npz(str(file))
