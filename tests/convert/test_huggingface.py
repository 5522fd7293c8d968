"""Compares Hugging Face's T5 and ViT, as our converter reads them, with transformers.

The models are small and random, made and saved by transformers (or torch) itself.
"""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn
from flax import traverse_util

from richhf_jax.convert import huggingface, mapping, writers
from richhf_jax.convert.source import ConvertError, Tensor
from richhf_jax.network import layers, t5, vit

torch.set_num_threads(1)

# More positions than the 128 from which on all distances share a bucket.
BATCH, LENGTH, TARGET_LENGTH, VOCAB = 2, 150, 140, 40
T5_SIZES = {"vocab_size": VOCAB, "d_model": 24, "d_kv": 8, "d_ff": 36, "num_heads": 2, "dropout_rate": 0.0}
T5_SIZES |= {"num_layers": 2, "num_decoder_layers": 1, "decoder_start_token_id": 0}
OUR_T5_SIZES = {"vocab_size": VOCAB, "emb_dim": 24, "head_dim": 8, "mlp_dim": 36, "num_heads": 2}
OUR_T5_SIZES |= {"num_encoder_layers": 2, "num_decoder_layers": 1, "dropout_rate": 0.0}
KINDS = {
    "1.0": ({"feed_forward_proj": "relu"}, ("relu",)),
    "1.1": ({"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, ("gelu", "linear")),
}
VIT_SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
VIT_SIZES |= {"patch_size": 4, "image_size": (16, 12)}
OUR_VIT_SIZES = {
    "emb_dim": 24,
    "num_layers": 2,
    "num_heads": 3,
    "mlp_dim": 20,
    "patch_size": 4,
    "grid": (4, 3),
}


def randomized(model):
    """Makes all parameters random: a scale of one or a bias of zero would hide its misuse."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@functools.cache
def t5_model(kind):
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5_SIZES, **KINDS[kind][0]))
    if kind == "1.1":
        # Transformers 5 ties the two unless it loads weights that differ, as the published do.
        model.lm_head.weight = torch.nn.Parameter(0.2 * torch.randn(VOCAB, T5_SIZES["d_model"]))
    return randomized(model)


@functools.cache
def vit_model():
    torch.manual_seed(0)
    return randomized(transformers.ViTModel(transformers.ViTConfig(**VIT_SIZES)))


class T5(nn.Module):
    """Our stacks around one token table, reading only text."""

    config: t5.T5Config

    def setup(self):
        self.token_embedder = layers.Embed(self.config.vocab_size, self.config.emb_dim)
        self.encoder = t5.Encoder(config=self.config)
        self.decoder = t5.Decoder(config=self.config, shared_embedding=self.token_embedder)

    def __call__(self, tokens, targets):
        """Encodes int [batch, length]; returns encodings, and logits for targets [batch, target_length]."""
        mask = layers.make_attention_mask(tokens > 0, tokens > 0)
        encoded = self.encoder(self.token_embedder(tokens), mask, deterministic=True)
        logits = self.decoder(
            encoded,
            jnp.pad(targets[:, :-1], ((0, 0), (1, 0))),
            decoder_mask=layers.make_decoder_mask(targets, jnp.float32),
            encoder_decoder_mask=layers.make_attention_mask(targets > 0, tokens > 0),
            deterministic=True,
        )
        return encoded, logits


def our_t5(kind):
    return T5(t5.T5Config(**OUR_T5_SIZES, mlp_activations=KINDS[kind][1], logits_via_embedding=kind == "1.0"))


def our_vit(**changed):
    return vit.ViT(
        vit.ViTConfig(**OUR_VIT_SIZES | {"class_token": True, "layer_norm_epsilon": 1e-12} | changed)
    )


def values(tensors, prefix=""):
    """Reads tensors to a nested tree; each array has the shape and type that its tensor says."""
    arrays = {}
    for name, tensor in tensors.items():
        arrays[name.removeprefix(prefix)] = array = tensor.read()
        assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype), name
    return traverse_util.unflatten_dict(arrays, sep="/")


def as_state(named_arrays):
    """Makes tensors, as a reader returns them, from torch's arrays."""
    arrays = {name: array.detach().numpy() for name, array in named_arrays}
    return {
        name: Tensor(name, array.shape, array.dtype, lambda array=array: array)
        for name, array in arrays.items()
    }


def assert_close(ours, theirs, tolerance):
    """Compares trees; the tolerance is relative to the largest number of each array."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        scale = np.abs(value).max()
        assert scale > 0, name
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=tolerance * scale, err_msg=name)


@pytest.fixture(scope="module")
def texts():
    """Makes tokens and targets; two thirds of the first text are padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCAB, (BATCH, LENGTH))
    tokens[0, LENGTH // 3 :] = 0
    return tokens, rng.integers(1, VOCAB, (BATCH, TARGET_LENGTH))


@pytest.mark.parametrize("kind", KINDS)
def test_t5_computes_what_transformers_does(kind, texts, tmp_path):
    model = t5_model(kind)
    model.save_pretrained(tmp_path)
    params = values(huggingface.open_huggingface(str(tmp_path)).tensors)
    tokens, targets = texts

    def loss_fn(params):
        encoded, logits = our_t5(kind).apply({"params": params}, tokens, targets)
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)
        return -jnp.mean(log_probs), (encoded, logits)

    (loss, (encoded, logits)), gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)

    theirs = model(
        input_ids=torch.tensor(tokens),
        attention_mask=torch.tensor(tokens > 0),
        labels=torch.tensor(targets),
    )
    model.zero_grad()
    theirs.loss.backward()
    valid = (tokens > 0)[..., None]  # Outputs in place of padding mean nothing.
    states = theirs.encoder_last_hidden_state.detach().numpy()
    assert_close(
        {"encoded": encoded * valid, "logits": logits, "loss": loss},
        {
            "encoded": states * valid,
            "logits": theirs.logits.detach().numpy(),
            "loss": theirs.loss.detach().numpy(),
        },
        1e-4,
    )
    their_gradient = as_state((name, p.grad) for name, p in model.named_parameters())
    their_gradient = values(huggingface.t5_tensors(their_gradient, tied=kind == "1.0"))
    flat = functools.partial(traverse_util.flatten_dict, sep="/")
    assert_close(flat(gradient), flat(their_gradient), 1e-3)


def test_vit_computes_what_transformers_does(rng, tmp_path):
    model = vit_model()
    model.save_pretrained(tmp_path)
    params = values(huggingface.open_huggingface(str(tmp_path)).tensors, "vit/")
    images = rng.standard_normal((2, 16, 12, 3)).astype(np.float32)
    weights = rng.standard_normal((2, 13, 24)).astype(np.float32)

    def loss_fn(params):
        states = our_vit().apply({"params": params}, images, deterministic=True)
        return jnp.mean(states * weights), states

    (_, states), gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)

    theirs = model(torch.tensor(images.transpose(0, 3, 1, 2))).last_hidden_state
    model.zero_grad()
    (theirs * torch.tensor(weights)).mean().backward()
    assert_close({"states": states}, {"states": theirs.detach().numpy()}, 1e-4)
    their_gradient = dict(
        as_state((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    )
    flat = functools.partial(traverse_util.flatten_dict, sep="/")
    # Each term of a sum has the sum's gradient, so the token's own gradient is compared.
    token = their_gradient[huggingface.CLASS_TOKEN].read()[0, 0]
    expected = flat(values(huggingface.vit_tensors(their_gradient, grid=(4, 3)), "vit/")) | {
        "class_token": token
    }
    gradient = flat(gradient)
    for layer in range(2):
        # A key's bias adds the same to all logits of a query, so its gradient is 0 except for rounding.
        name = f"layers_{layer}/attention/key/bias"
        noise = 1e-4 * np.abs(expected[name.replace("key", "query")]).max()
        assert max(np.abs(tree.pop(name)).max() for tree in (gradient, expected)) < noise
    assert_close(gradient, expected, 1e-3)


def save(model, directory, how):
    """Saves in one of the ways that checkpoints are published."""
    if how == "sharded safetensors":
        model.save_pretrained(directory, max_shard_size="10KB")
        assert not (directory / "model.safetensors").exists()
        return
    model.save_pretrained(directory)
    state = model.state_dict()
    if how == "bin":
        (directory / "model.safetensors").unlink()
        torch.save(state, directory / "pytorch_model.bin")
    if how == "sharded bin":
        (directory / "model.safetensors").unlink()
        names = sorted(state)
        shards = {"a.bin": names[::2], "b.bin": names[1::2]}
        for file, members in shards.items():
            torch.save({name: state[name] for name in members}, directory / file)
        places = {name: file for file, members in shards.items() for name in members}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize("how", ["safetensors", "sharded safetensors", "bin", "sharded bin"])
@pytest.mark.parametrize("kind", [*KINDS, "vit"])
def test_every_way_of_saving(kind, how, tmp_path):
    model = vit_model() if kind == "vit" else t5_model(kind)
    save(model, tmp_path, how)
    source = huggingface.open_huggingface(str(tmp_path))
    state = as_state(model.state_dict().items())
    if kind == "vit":
        expected = huggingface.vit_tensors(state, grid=(4, 3))
    else:
        expected = huggingface.t5_tensors(state, tied=kind == "1.0")
    jax.tree.map(np.testing.assert_array_equal, values(source.tensors), values(expected))
    # Duplicates of the token table are neither loaded nor unused.
    unused = ["pooler.dense.bias", "pooler.dense.weight"] if kind == "vit" else []
    assert sorted(source.unused) == unused


def test_a_classifiers_vit(tmp_path):
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**VIT_SIZES))
    model.save_pretrained(tmp_path)
    source = huggingface.open_huggingface(str(tmp_path))
    expected = huggingface.vit_tensors(as_state(model.vit.state_dict().items()), grid=(4, 3))
    jax.tree.map(np.testing.assert_array_equal, values(source.tensors), values(expected))
    assert [*source.unused] == ["classifier.bias", "classifier.weight"]


def test_a_t5_encoder_alone(tmp_path):
    model = transformers.T5EncoderModel(transformers.T5Config(**T5_SIZES, **KINDS["1.1"][0]))
    model.save_pretrained(tmp_path)
    source = huggingface.open_huggingface(str(tmp_path))
    whole = huggingface.t5_tensors(as_state(t5_model("1.1").state_dict().items()), tied=False)
    assert source.tensors.keys() == {name for name in whole if not name.startswith("decoder/")}
    # An encoder says nothing of logits.
    assert "t5_config.logits_via_embedding" not in source.settings


def test_t5_1_1_that_transformers_tied(tmp_path):
    """Transformers saves a T5 1.1 of its own making with the token table as logits' kernel, unscaled."""
    config = transformers.T5Config(**T5_SIZES, **KINDS["1.1"][0])
    model = transformers.T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    source = huggingface.open_huggingface(str(tmp_path))
    kernel = source.tensors["decoder/logits_dense/kernel"]
    np.testing.assert_array_equal(kernel.read().T, model.shared.weight.detach().numpy())
    assert source.settings["t5_config.logits_via_embedding"] is False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_so_until_it_is_used(dtype, tmp_path):
    model = transformers.T5EncoderModel(transformers.T5Config(**T5_SIZES)).to(dtype)
    model.save_pretrained(tmp_path)
    tensor = huggingface.open_huggingface(str(tmp_path)).tensors["encoder/layers_1/mlp/wi/kernel"]
    expected = model.encoder.block[1].layer[1].DenseReluDense.wi.weight.T.detach()
    assert tensor.dtype == tensor.read().dtype == jnp.dtype(str(dtype).removeprefix("torch."))
    np.testing.assert_array_equal(tensor.astype(np.float32).read(), expected.float().numpy())


@pytest.mark.parametrize("kind", [*KINDS, "vit"])
def test_settings_are_those_of_our_configuration(kind, tmp_path):
    (vit_model() if kind == "vit" else t5_model(kind)).save_pretrained(tmp_path)
    settings = huggingface.open_huggingface(str(tmp_path)).settings
    config = our_vit().config if kind == "vit" else our_t5(kind).config
    prefix = "vit_config." if kind == "vit" else "t5_config."
    assert settings == {
        prefix + name: getattr(config, name) for name in (s.removeprefix(prefix) for s in settings)
    }
    assert f"{prefix}num_heads" in settings


@pytest.mark.parametrize("kind", [*KINDS, "vit"])
def test_there_and_back(kind, tmp_path):
    """Parameters written for transformers have the same bits, and the same outputs in transformers."""
    model = vit_model() if kind == "vit" else t5_model(kind)
    model.save_pretrained(tmp_path / "theirs")
    tensors = huggingface.open_huggingface(str(tmp_path / "theirs")).tensors
    configs = {"t5_config": our_t5("1.0" if kind == "vit" else kind).config, "vit_config": our_vit().config}
    lines = writers.write_huggingface(tmp_path, tensors, configs)
    if kind == "vit":
        assert lines == ["T5 is left out: no source has it"]
        read = functools.partial(transformers.ViTModel.from_pretrained, add_pooling_layer=False)
    else:
        assert lines == ["ViT is left out: no source has it"]
        read = transformers.T5ForConditionalGeneration.from_pretrained
    again, report = read(tmp_path / ("vit" if kind == "vit" else "t5"), output_loading_info=True)
    assert not any(report.values()), report
    before, after = model.state_dict(), again.state_dict()
    assert after.keys() == {name for name in before if not name.startswith("pooler")}
    if kind == "vit":
        # Token and position are one parameter.
        token, positions = (
            before["embeddings.cls_token"].clone(),
            before["embeddings.position_embeddings"].clone(),
        )
        before["embeddings.cls_token"] = token + positions[:, :1]
        before["embeddings.position_embeddings"] = positions.index_fill(1, torch.tensor([0]), 0.0)
    for name, value in after.items():
        np.testing.assert_array_equal(value.numpy(), before[name].numpy(), err_msg=name)
    if kind != "vit":
        tokens = torch.arange(1, 9)[None]
        outputs = [m(input_ids=tokens, labels=tokens).logits.detach() for m in (model, again.eval())]
        np.testing.assert_array_equal(*outputs)


def test_what_hugging_faces_vit_can_not_hold_is_left_out(tmp_path):
    configs = {"t5_config": our_t5("1.0").config, "vit_config": our_vit(class_token=False).config}
    table = as_state([("vit/position_embedding/embedding", torch.zeros(4, 3, 24))])
    lines = writers.write_huggingface(tmp_path, table, configs)
    assert lines[1] == "vit/ is left out: Hugging Face's ViT has a class token and no stem"
    assert list(tmp_path.iterdir()) == []


def test_half_a_t5_is_not_exported(tmp_path):
    configs = {"t5_config": our_t5("1.0").config, "vit_config": our_vit().config}
    tensors = huggingface.t5_tensors(as_state(t5_model("1.0").state_dict().items()))
    del tensors["decoder/decoder_norm/scale"]
    with pytest.raises(ConvertError, match="T5 is not whole, 1 of its .* decoder/decoder_norm/scale"):
        writers.write_huggingface(tmp_path, tensors, configs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saves a whole T5 in shards; tests damage it."""
    directory = tmp_path_factory.mktemp("saved")
    save(t5_model("1.0"), directory, "sharded safetensors")
    return directory


@pytest.fixture
def directory(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "t5")


def change_config(directory, **changed):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def truncate(file):
    file.write_bytes(file.read_bytes()[:-10])


SHARD = "model-00001-of-*.safetensors"
DAMAGES = {
    "config truncated": (lambda d: truncate(d / "config.json"), "config.json is truncated"),
    "index truncated": (
        lambda d: truncate(d / "model.safetensors.index.json"),
        "model.safetensors.index.json is truncated",
    ),
    "index without a map": (
        lambda d: (d / "model.safetensors.index.json").write_text("{}"),
        "model.safetensors.index.json has no weight_map",
    ),
    "shard truncated": (lambda d: truncate(next(d.glob(SHARD))), "model-00001-of-.* is truncated"),
    "shard missing": (
        lambda d: next(d.glob(SHARD)).unlink(),
        "model-00001-of-.* is missing, which model.safetensors.index.json names",
    ),
    "shard of another": (
        lambda d: shutil.copy(next(d.glob(SHARD.replace("1-", "2-"))), next(d.glob(SHARD))),
        "model-00001-of-.* lacks .*, which model.safetensors.index.json says it has",
    ),
    "no weights": (
        lambda d: [file.unlink() for file in d.glob("*model*")],
        "holds no weights: no model.safetensors and no pytorch_model.bin",
    ),
    "another model": (
        lambda d: change_config(d, model_type="bert"),
        "config.json: the model is 'bert', none of t5",
    ),
    "silent": (
        lambda d: (d / "config.json").write_text('{"model_type": "t5"}'),
        "config.json has no value for",
    ),
    "too deep": (
        lambda d: change_config(d, num_layers=3),
        "lack 8 of the .* encoder.block.2.layer.0.layer_norm",
    ),
    "activation": (
        lambda d: change_config(d, feed_forward_proj="gated-x"),
        "feed_forward_proj 'gated-x' is none",
    ),
    "distance": (
        lambda d: change_config(d, relative_attention_max_distance=64),
        "relative_attention_max_distance is 64; our T5 has 128 only",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(damage, directory):
    do, message = DAMAGES[damage]
    do(directory)
    with pytest.raises(ConvertError, match=message):
        huggingface.open_huggingface(str(directory))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; our ViT has 'gelu'"),
        ({"image_size": 16}, r"position_embeddings has 13 rows; a class token and \(4, 4\) patches"),
    ],
)
def test_a_vit_that_is_not_ours_is_named(changed, message, tmp_path):
    vit_model().save_pretrained(tmp_path)
    change_config(tmp_path, **changed)
    with pytest.raises(ConvertError, match=message):
        huggingface.open_huggingface(str(tmp_path))


@pytest.mark.parametrize(("mean", "noted"), [([0.5, 0.5, 0.5], False), ([0.485, 0.456, 0.406], True)])
def test_pixels_of_another_range_are_noted(mean, noted, tmp_path):
    vit_model().save_pretrained(tmp_path)
    config = {"image_mean": mean, "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    note = huggingface.open_huggingface(str(tmp_path)).note
    assert (str(mean) in note) == noted


@pytest.fixture
def state():
    return {name: array.clone() for name, array in t5_model("1.0").state_dict().items()}


def save_state(directory, state, kind="1.0"):
    t5_model(kind).config.save_pretrained(directory)
    torch.save(state, directory / "pytorch_model.bin")
    return huggingface.open_huggingface(str(directory))


def test_equal_copies_of_the_table_are_taken(state, tmp_path):
    source = save_state(tmp_path, state)
    assert [*source.copies] == [
        "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight",
    ]  # fmt: skip
    mapping.check_copies([source])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["encoder.embed_tokens.weight", "lm_head.weight"])
def test_another_table_is_refused_or_loaded(kind, name, state, tmp_path):
    """Transformers 5 keeps two arrays that it ties apart, where a file has both and they differ."""
    wrong = {**t5_model(kind).state_dict(), name: state["shared.weight"] * 2}
    source = save_state(tmp_path, wrong, kind)
    if (kind, name) == ("1.1", "lm_head.weight"):
        mapping.check_copies([source])
        kernel = source.tensors["decoder/logits_dense/kernel"].read()
        np.testing.assert_array_equal(kernel.T, wrong[name].numpy())
    else:
        with pytest.raises(ConvertError, match=f"{name} .* has other values than shared.weight"):
            mapping.check_copies([source])


def test_names_with_a_trainers_prefix(state, tmp_path):
    source = save_state(tmp_path, {f"module.{name}": array for name, array in state.items()})
    expected = huggingface.t5_tensors(as_state(state.items()))
    jax.tree.map(np.testing.assert_array_equal, values(source.tensors), values(expected))
    assert source.note == "all names begin with 'module.', which is taken off"
    assert "module.lm_head.weight" in source.copies
    assert source.unused == {}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_layers": 10**9}, "num_layers is 1000000000, no number from 1 to 1000"),
        ({"num_decoder_layers": "2"}, "num_decoder_layers is '2', no number"),
        ({"feed_forward_proj": ["relu"]}, "config.json makes no sense: unhashable"),
    ],
)
def test_a_config_without_sense(changed, message, directory):
    change_config(directory, **changed)
    with pytest.raises(ConvertError, match=message):
        huggingface.open_huggingface(str(directory))


def test_a_shard_elsewhere_is_not_opened(directory):
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["shared.weight"] = "../t5/model.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ConvertError, match="names '../t5/model.safetensors': shards must lie beside it"):
        huggingface.open_huggingface(str(directory))


def test_a_layer_of_a_number_without_sense_is_named(state, tmp_path):
    name = "encoder.block.999999999.layer.0.layer_norm.weight"
    source = save_state(tmp_path, state | {name: torch.ones(24)})
    assert source.unused == {name: (24,)}


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("embeddings.position_embeddings", torch.ones(13, 24)),
        ("embeddings.cls_token", torch.ones(24)),
    ],
)
def test_positions_of_another_rank(name, array, tmp_path):
    vit_model().config.save_pretrained(tmp_path)
    torch.save({**vit_model().state_dict(), name: array}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConvertError, match=f"{name} has shape .*, expected"):
        huggingface.open_huggingface(str(tmp_path))
