import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from flax.linen import partitioning

from richhf_jax.network import layers, t5

CONFIG = t5.T5Config(
    vocab_size=30,
    emb_dim=16,
    num_heads=2,
    num_encoder_layers=1,
    num_decoder_layers=2,
    head_dim=4,
    mlp_dim=24,
    mlp_activations=("gelu", "linear"),
)


class EncoderDecoder(nn.Module):
    """Both stacks around one token table, as a network of T5X owns them."""

    config: t5.T5Config

    def setup(self):
        cfg = self.config
        self.token_embedder = layers.Embed(
            cfg.vocab_size,
            cfg.emb_dim,
            dtype=cfg.dtype,
            attend_dtype=jnp.float32,
            embedding_init=nn.initializers.normal(1.0),
        )
        self.encoder = t5.Encoder(config=cfg)
        self.decoder = t5.Decoder(config=cfg, shared_embedding=self.token_embedder)

    def __call__(self, embeddings, valid, tokens):
        return self.decode(self.encode(embeddings, valid), valid, tokens)

    def encode(self, embeddings, valid):
        return self.encoder(embeddings, layers.make_attention_mask(valid, valid), deterministic=True)

    def decode(self, encoded, valid, tokens, decode=False, max_decode_length=None):
        mask = None if decode else layers.make_causal_mask(tokens)
        cross_mask = layers.make_attention_mask(jnp.ones_like(tokens), valid)
        return self.decoder(
            encoded,
            tokens,
            decoder_mask=mask,
            encoder_decoder_mask=cross_mask,
            deterministic=True,
            decode=decode,
            max_decode_length=max_decode_length,
        )


@pytest.fixture(scope="module")
def inputs():
    """Embeddings of 9 positions, the last 3 of the second example padding; 6 tokens to decode."""
    rng = np.random.default_rng(1)
    valid = np.ones((3, 9), np.int32)
    valid[1, 6:] = 0
    tokens = rng.integers(2, 30, (3, 6)).astype(np.int32)
    return rng.standard_normal((3, 9, 16)).astype(np.float32), valid, tokens


@pytest.fixture(scope="module")
def params(random_params, inputs):
    return random_params(EncoderDecoder(CONFIG), *inputs)


@functools.cache
def _jitted(config, method):
    return jax.jit(functools.partial(EncoderDecoder(config).apply, method=method))


def _apply(params, *args, config=CONFIG, method=None):
    return _jitted(config, method)(params, *args)


def _layer(attentions, norms):
    """Names, shapes and axes of one layer of T5X's tree, for `CONFIG`."""
    tree = {
        "mlp/wi_0/kernel": ((16, 24), ("embed", "mlp")),
        "mlp/wi_1/kernel": ((16, 24), ("embed", "mlp")),
        "mlp/wo/kernel": ((24, 16), ("mlp", "embed")),
    }
    for name in attentions:
        for part in ("query", "key", "value"):
            tree[f"{name}/{part}/kernel"] = ((16, 8), ("embed", "joined_kv"))
        tree[f"{name}/out/kernel"] = ((8, 16), ("joined_kv", "embed"))
    for name in norms:
        tree[f"{name}/scale"] = ((16,), ("embed",))
    return tree


def _t5x_tree():
    """Parameter names of `t5x/examples/t5/network.py`, which the T5 1.1 checkpoints of its README hold."""
    tree = {
        "token_embedder/embedding": ((30, 16), ("vocab", "embed")),
        "encoder/relpos_bias/rel_embedding": ((2, 32), ("heads", "relpos_buckets")),
        "encoder/encoder_norm/scale": ((16,), ("embed",)),
        "decoder/relpos_bias/rel_embedding": ((2, 32), ("heads", "relpos_buckets")),
        "decoder/decoder_norm/scale": ((16,), ("embed",)),
        "decoder/logits_dense/kernel": ((16, 30), ("embed", "vocab")),
    }
    encoder_layer = _layer(["attention"], ["pre_attention_layer_norm", "pre_mlp_layer_norm"])
    decoder_layer = _layer(
        ["self_attention", "encoder_decoder_attention"],
        ["pre_self_attention_layer_norm", "pre_cross_attention_layer_norm", "pre_mlp_layer_norm"],
    )
    tree |= {f"encoder/layers_0/{name}": entry for name, entry in encoder_layer.items()}
    for i in range(2):
        tree |= {f"decoder/layers_{i}/{name}": entry for name, entry in decoder_layer.items()}
    return tree


def test_parameters_are_those_of_t5x(inputs):
    variables = jax.eval_shape(EncoderDecoder(CONFIG).init, jax.random.key(0), *inputs)
    flat = traverse_util.flatten_dict(variables["params"], sep="/")
    axes = partitioning.get_axis_names(variables["params_axes"])
    axes = traverse_util.flatten_dict(axes.unfreeze(), sep="/")
    assert {name: (value.shape, tuple(axes[name])) for name, value in flat.items()} == _t5x_tree()
    assert {value.dtype for value in flat.values()} == {jnp.dtype("float32")}


def test_relative_position_biases_start_uniform_of_fan_average():
    module = t5._relative_position_biases(CONFIG.replace(num_heads=32))
    table = module.init(jax.random.key(0), 2, 2)["params"]["rel_embedding"]
    assert np.abs(table).max() <= np.sqrt(3 / 32)
    assert np.std(table) == pytest.approx(np.sqrt(1 / 32), rel=0.05)


def test_decoder_is_causal_by_gradient(params, inputs):
    embeddings, valid, tokens = inputs
    encoded = _apply(params, embeddings, valid, method="encode")

    def logits_of(embedded):
        # A table of these very vectors, looked up in order: so the logits have gradients to them.
        table = jnp.concatenate([embedded[0], jnp.zeros((24, 16))])
        replaced = {**params["params"], "token_embedder": {"embedding": table}}
        return _apply({"params": replaced}, encoded[:1], valid[:1], jnp.arange(6)[None], method="decode")[0]

    embedded = params["params"]["token_embedder"]["embedding"][tokens[:1]]
    jacobian = jax.jit(jax.jacobian(lambda x: logits_of(x).sum(axis=-1)))(embedded)[:, 0]
    # [logits' position, input's position]
    influence = np.abs(jacobian).sum(axis=-1)
    assert (influence[np.tril_indices(6)] > 1e-6).all()
    assert (influence[np.triu_indices(6, k=1)] == 0).all()


def test_encoder_sees_both_ways(params, inputs):
    embeddings, valid, _ = inputs

    def total(x):
        return _apply(params, x, valid, method="encode")[0].sum(axis=-1)

    influence = np.abs(jax.jit(jax.jacobian(total))(embeddings)[:, 0]).sum(axis=-1)
    assert (influence > 1e-6).all()


def test_padding_changes_no_output(params, inputs):
    embeddings, valid, tokens = inputs
    other = embeddings.copy()
    other[1, 6:] = 100
    encoded, changed = (_apply(params, x, valid, method="encode") for x in (embeddings, other))
    np.testing.assert_array_equal(encoded[1, :6], changed[1, :6])
    assert not np.allclose(encoded[1, 6:], changed[1, 6:])
    np.testing.assert_array_equal(
        _apply(params, encoded, valid, tokens, method="decode"),
        _apply(params, changed, valid, tokens, method="decode"),
    )
    # Longer padding: the same as none at all.
    alone = _apply(params, embeddings[1:2, :6], valid[1:2, :6], tokens[1:2])
    np.testing.assert_allclose(_apply(params, *inputs)[1:2], alone, rtol=1e-5, atol=1e-5)


def test_batch_permutation(params, inputs):
    order = np.array([2, 0, 1])
    permuted = _apply(params, *(array[order] for array in inputs))
    np.testing.assert_allclose(permuted, _apply(params, *inputs)[order], rtol=1e-5, atol=1e-6)


def _empty_cache(encoded, valid, tokens):
    def init():
        model = EncoderDecoder(CONFIG)
        return model.init(jax.random.key(0), encoded, valid, tokens, True, 6, method="decode")

    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(init)["cache"])


def test_cached_decoding_equals_uncached(params, inputs):
    embeddings, valid, tokens = inputs
    model = EncoderDecoder(CONFIG)
    encoded = _apply(params, embeddings, valid, method="encode")
    expected = _apply(params, encoded, valid, tokens, method="decode")

    cache = model.init(jax.random.key(0), encoded, valid, jnp.zeros_like(tokens), True, 6, method="decode")[
        "cache"
    ]
    step = jax.jit(
        lambda cache, token: model.apply(
            {**params, "cache": cache}, encoded, valid, token, True, 6, method="decode", mutable=["cache"]
        )
    )
    for i in range(6):
        logits, updated = step(cache, tokens[:, i : i + 1])
        cache = updated["cache"]
        np.testing.assert_allclose(logits[:, 0], expected[:, i], rtol=1e-4, atol=1e-5)
    index = cache["decoder"]["layers_1"]["self_attention"]["cache_index"]
    assert int(index) == 6


def test_a_decoding_step_takes_one_position(params, inputs):
    embeddings, valid, tokens = inputs
    model = EncoderDecoder(CONFIG)
    encoded = jnp.asarray(embeddings)
    cache = _empty_cache(encoded, valid, tokens)
    with pytest.raises(ValueError, match=r"one position of shape \(3, 1, 2, 4\) a step, got \(3, 6, 2, 4\)"):
        model.apply(
            {**params, "cache": cache}, encoded, valid, tokens, True, 6, method="decode", mutable=["cache"]
        )


def test_order_reaches_the_encoder_by_relative_positions_alone(params, inputs):
    embeddings, valid = inputs[0][:1], inputs[1][:1]

    def encodings(tree):
        forward = _apply({"params": tree}, embeddings, valid, method="encode")
        return forward, _apply({"params": tree}, embeddings[:, ::-1], valid, method="encode")[:, ::-1]

    assert not np.allclose(*encodings(params["params"]), atol=1e-3)
    flat = traverse_util.flatten_dict(params["params"])
    name = ("encoder", "relpos_bias", "rel_embedding")
    flat[name] = jnp.zeros_like(flat[name])
    np.testing.assert_allclose(*encodings(traverse_util.unflatten_dict(flat)), rtol=1e-4, atol=1e-5)


def test_tied_logits_use_the_token_table(random_params, inputs):
    config = CONFIG.replace(logits_via_embedding=True)
    variables = random_params(EncoderDecoder(config), *inputs)
    assert "logits_dense" not in variables["params"]["decoder"]
    apply = functools.partial(
        EncoderDecoder(config).apply,
        capture_intermediates=lambda module, _: module.name == "decoder_norm",
    )
    logits, state = jax.jit(apply)(variables, *inputs)
    (hidden,) = state["intermediates"]["decoder"]["decoder_norm"]["__call__"]
    table = variables["params"]["token_embedder"]["embedding"]
    np.testing.assert_allclose(logits, hidden @ table.T / 4, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_near_float32_and_gives_float32_logits(params, inputs):
    exact = _apply(params, *inputs)
    config = CONFIG.replace(dtype=jnp.bfloat16, float32_attention_logits=True)
    rounded = _apply(params, *inputs, config=config)
    assert rounded.dtype == jnp.float32
    # bfloat16 keeps 8 bits: 0.4 % an operation, a few operations deep.
    assert 0 < np.abs(rounded - exact).max() < 0.05 * np.abs(exact).max()


def test_dropout_acts_only_when_not_deterministic(random_params, inputs):
    embeddings = inputs[0]
    encoder = t5.Encoder(config=CONFIG.replace(dropout_rate=0.5, num_encoder_layers=1))
    params = random_params(encoder, embeddings, deterministic=True)

    @jax.jit
    def encode(seed):
        return encoder.apply(params, embeddings, rngs={"dropout": jax.random.key(seed)})

    assert (encode(0) == 0).mean() == pytest.approx(0.5, abs=0.1)
    assert not np.allclose(encode(0), encode(1))
    np.testing.assert_array_equal(encode(0), encode(0))


def test_encoder_rejects_another_width():
    with pytest.raises(ValueError, match=r"expected \[batch, length, 16\], got \(1, 3, 8\)"):
        t5.Encoder(config=CONFIG).init(jax.random.key(0), jnp.zeros((1, 3, 8)), deterministic=True)


@pytest.mark.parametrize(
    ("image_positions", "expected"),
    [("running", [-3, -2, -1, 0, 1]), ("after_text", [2, 3, 4, 0, 1]), ("one_point", [-1, -1, -1, 0, 1])],
)
def test_encoder_positions_of_the_docstring(image_positions, expected):
    np.testing.assert_array_equal(t5.encoder_positions(3, 2, image_positions), expected)


def test_unknown_image_positions_are_refused():
    with pytest.raises(ValueError, match="'running', 'after_text', 'one_point'.*got 'rows'"):
        t5.encoder_positions(3, 2, "rows")


def _encode_image_and_text(image_positions, params, embeddings, order=slice(None), image_tokens=4):
    """Encodes 4 image tokens in some order and 5 of text; gives the text's encodings."""
    encoder = t5.Encoder(CONFIG.replace(image_positions=image_positions))
    embeddings = np.concatenate([embeddings[:, :4][:, order], embeddings[:, 4:]], axis=1)
    apply = functools.partial(encoder.apply, image_tokens=image_tokens, deterministic=True)
    return jax.jit(apply)({"params": params["params"]["encoder"]}, embeddings)[:, 4:]


def test_image_positions_decide_whether_the_patches_order_matters(params, inputs):
    embeddings = inputs[0]
    encoded = {}
    for image_positions in t5.IMAGE_POSITIONS:
        plain, mixed = (
            _encode_image_and_text(image_positions, params, embeddings, order)
            for order in (slice(None), [2, 0, 3, 1])
        )
        encoded[image_positions] = plain
        same = np.abs(plain - mixed).max() < 1e-5
        assert same == (image_positions == "one_point"), image_positions
    assert np.abs(encoded["running"] - encoded["after_text"]).max() > 1e-3
    # One running sequence is T5X's own: it matters not how many of its tokens are the image's.
    whole = _encode_image_and_text("running", params, embeddings, image_tokens=0)
    np.testing.assert_array_equal(encoded["running"], whole)
