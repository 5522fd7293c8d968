"""The whole generator against diffusers' pipelines, there and back by the converter, and its costs."""

import functools
import json
import pathlib
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_amused
from flax import traverse_util

import tasks
from richhf_jax import clip_tokens
from richhf_jax.convert import amused, amused_writer, mapping
from richhf_jax.convert.source import ConvertError
from richhf_jax.costs import counter
from richhf_jax.muse import decoding, generator, transformer, vqgan
from richhf_jax.network import clip

torch.set_num_threads(1)

LENGTH, VOCAB = 12, 774
NETWORK = generator.Muse(
    clip.TextConfig(16, 2, 2, 24, vocab_size=VOCAB, max_length=LENGTH, pad_id=VOCAB - 1),
    transformer.TransformerConfig(
        vocab_size=40, codebook_size=32, grid=(4, 4), emb_dim=24, num_layers=2, num_heads=3, mlp_dim=28,
        token_dim=12, conv_dim=16, conv_num_heads=2, num_conv_blocks=1, downsample=True,
        micro_condition_dim=8,
    ),
    vqgan.VQGANConfig((8, 16), 1, latent_dim=6, code_dim=6, codebook_size=32, norm_groups=4),
    projection_dim=10,
)  # fmt: skip
PROMPTS = ["a red star", "two large blue crosses and a green star"]
NEGATIVE = "a star"
# Of diffusers' pipelines.
ARGUMENTS = {"negative_prompt": [NEGATIVE] * 2, "guidance_scale": 3.0, "output_type": "latent"}


@pytest.fixture(scope="module")
def vocabulary():
    return (pathlib.Path(tasks.__file__).parent / "clip_small.json").read_bytes()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, random_values, vocabulary):
    """Writes random parameters as diffusers' folder, and opens it by diffusers."""
    images, texts = np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, LENGTH), np.int32)
    variables = jax.eval_shape(NETWORK.init, jax.random.key(0), images, texts, np.zeros((1, 5), np.float32))
    params = traverse_util.flatten_dict(random_values(variables["params"]), sep="/")
    tensors = {
        name: amused.Tensor(name, array.shape, array.dtype, lambda array=array: array)
        for name, array in params.items()
    }
    folder = tmp_path_factory.mktemp("amused")
    amused_writer.write(folder, tensors, configs(), vocabulary)
    made = diffusers.AmusedPipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return folder, params, made


def configs():
    return {f"{name}_config": getattr(NETWORK, f"{name}_config") for name in ("text", "transformer", "vqgan")}


def test_a_pipeline_comes_back_from_diffusers(pipeline, tmp_path):
    folder, params, made = pipeline
    made.save_pretrained(tmp_path)
    for place in (folder, tmp_path):
        assert amused.is_amused(str(place))
        source = amused.open_amused(str(place))
        assert mapping.check_settings(configs(), [source]) == []
        assert not source.unused
        assert set(source.tensors) == set(params)
        for name, tensor in source.tensors.items():
            assert tensor.shape == params[name].shape
            np.testing.assert_array_equal(tensor.read(), params[name])


def encoded(texts, vocabulary):
    tokens, _ = clip_tokens.ClipTokens(vocabulary).encode(texts, LENGTH)
    return tokens


def nested(params):
    return traverse_util.unflatten_dict(params, sep="/")


def test_texts_are_encoded_as_by_transformers(pipeline, vocabulary):
    _, params, made = pipeline
    # Ours are filled up with 0, theirs with the vocabulary's end.
    ids = made.tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    assert (ids[:, -1] == VOCAB - 1).all()
    with torch.no_grad():
        expected = made.text_encoder(ids, output_hidden_states=True)
    encode = jax.jit(functools.partial(NETWORK.apply, method="encode_text"))
    states, pooled = encode({"params": nested(params)}, encoded(PROMPTS, vocabulary))
    np.testing.assert_allclose(states, expected.hidden_states[-2], atol=1e-4)
    np.testing.assert_allclose(pooled, expected.text_embeds, atol=1e-4)


@pytest.fixture
def same_noise(rng, monkeypatch):
    """Makes both sides draw by the same Gumbel noise."""
    draws = rng.gumbel(size=(12, 2, 4, 4, 32)).astype(np.float32)
    confidences = rng.gumbel(size=(12, 2, 4, 4)).astype(np.float32)
    of_draws, of_confidences = iter(torch.tensor(draws)), iter(torch.tensor(confidences))

    def multinomial(probs, count, generator=None):
        return torch.argmax(torch.log(probs) + next(of_draws).reshape(probs.shape), dim=-1)[:, None]

    def of_step(rngs, shape):
        assert shape == (4, 4, 32)
        return lambda step: (jnp.asarray(draws)[step], jnp.asarray(confidences)[step])

    monkeypatch.setattr(torch, "multinomial", multinomial)
    monkeypatch.setattr(
        scheduling_amused,
        "gumbel_noise",
        lambda probs, generator=None: next(of_confidences).reshape(probs.shape),
    )
    monkeypatch.setattr(decoding, "gumbel_noise", of_step)


def ours(params, vocabulary, config, tokens=None):
    """Generates tokens."""
    texts = encoded(PROMPTS, vocabulary), encoded([NEGATIVE] * 2, vocabulary)

    @jax.jit
    def generate(params, *texts):
        conditions = generator.micro_conditions(2, 8, 8)
        keys = jax.random.split(jax.random.key(0), 2)
        return generator.generate(NETWORK, params, *texts, conditions, keys, config, tokens)

    return generate(nested(params), *texts)


def test_tokens_and_images_are_those_of_diffusers_pipeline(pipeline, vocabulary, same_noise):
    _, params, made = pipeline
    tokens = made(PROMPTS, **ARGUMENTS, num_inference_steps=6).images
    found = ours(params, vocabulary, decoding.DecodingConfig(6, guidance_scale=(3.0, 3.0)))
    np.testing.assert_array_equal(found, tokens)
    assert len(np.unique(found)) > 8
    decode = jax.jit(functools.partial(NETWORK.apply, method="decode_tokens"))
    images = decode({"params": nested(params)}, found)
    decoded = made.vqvae.decode(tokens, force_not_quantize=True, shape=(2, 4, 4, 6)).sample.detach()
    expected = made.image_processor.postprocess(decoded.clip(0, 1), "pil")
    difference = generator.to_uint8(images).astype(int) - np.stack(list(map(np.asarray, expected)))
    assert np.abs(difference).max() <= 1
    assert np.mean(difference != 0) < 0.01


def test_inpainted_tokens_are_those_of_diffusers_pipeline(pipeline, vocabulary, same_noise, rng):
    _, params, made = pipeline
    made = diffusers.AmusedInpaintPipeline(**made.components)
    image = rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    mask = np.zeros((2, 4, 4), bool)
    mask[0, :2], mask[1, :, 1:3] = True, True
    pixels = torch.tensor(image).permute(0, 3, 1, 2) / 255
    cells = torch.tensor(mask, dtype=torch.float32)[:, None]
    tokens = made(PROMPTS, pixels, cells, **ARGUMENTS, num_inference_steps=5).images
    tokenize = jax.jit(functools.partial(NETWORK.apply, method="tokenize"))
    given = tokenize({"params": nested(params)}, image)
    config = decoding.DecodingConfig(5, decoding.LINEAR, guidance_scale=(3.0, 3.0))
    mask_id = NETWORK.transformer_config.mask_id
    found = ours(params, vocabulary, config, jnp.where(mask, mask_id, given))
    np.testing.assert_array_equal(found, tokens)
    np.testing.assert_array_equal(found[~mask], given[~mask])
    assert (found[mask] != given[mask]).any()


def flops(function, *args):
    return counter.model_flops(jax.jit(function).lower(*args))


def test_n_steps_cost_n_calls_of_the_transformer_and_one_of_the_decoder(pipeline, vocabulary):
    params, rows = nested(pipeline[1]), 4  # Two images, each with its negative prompt.
    config = decoding.DecodingConfig(7, guidance_scale=(2.0, 9.0))
    texts = encoded(PROMPTS, vocabulary), encoded([NEGATIVE] * 2, vocabulary)
    keys = jax.random.split(jax.random.key(0), 2)
    tokens, conditions = jnp.zeros((rows, 4, 4), jnp.int32), generator.micro_conditions(rows, 8, 8)

    def cost(method, *args):
        return flops(lambda *args: NETWORK.apply({"params": params}, *args, method=method), *args)

    def loop(logits):
        """Decodes with logits that cost nothing."""
        noise_fn = decoding.gumbel_noise(keys, (4, 4, 32))
        return decoding.decode(lambda tokens: logits, tokens[:2], 39, noise_fn, config)

    def images(params):
        made = generator.generate(NETWORK, params, *texts, conditions[:2], keys, config)
        return NETWORK.apply({"params": params}, made, method="decode_tokens")

    text = cost("encode_text", jnp.zeros((rows, LENGTH), jnp.int32))
    a_call = cost("logits", tokens, jnp.zeros((rows, LENGTH, 16)), jnp.zeros((rows, 10)), conditions)
    decoder = cost("decode_tokens", tokens[:2])
    rest = flops(loop, jnp.zeros((rows, 4, 4, 32)))
    assert flops(images, params) == pytest.approx(text + 7 * a_call + decoder + rest, rel=1e-3)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("transformer/config.json", {"use_bias": True}, "use_bias is True; our network has False only"),
        ("transformer/config.json", {"upsample": False}, "one of downsample and upsample is true"),
        ("transformer/config.json", {"hidden_size": None}, "has no value for 'hidden_size'"),
        ("transformer/config.json", {"num_hidden_layers": 3}, "the weights lack 17 of the"),
        ("vqvae/config.json", {"mid_block_add_attention": None}, "mid_block_add_attention is True; our"),
        ("vqvae/config.json", {"up_block_types": ["AttnUpDecoderBlock2D"]}, "'UpDecoderBlock2D' only"),
        (
            "scheduler/scheduler_config.json",
            {"mask_token_id": 3},
            "the scheduler's mask_token_id 3; our mask",
        ),
        ("tokenizer/tokenizer_config.json", {"pad_token": "[PAD]"}, r"the vocabulary has no '\[PAD\]'"),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act is 'relu'; our CLIP has"),
        ("scheduler/scheduler_config.json", None, "scheduler_config.json is missing"),
    ],
)
def test_other_pipelines_are_refused(pipeline, tmp_path, file, changes, message):
    shutil.copytree(pipeline[0], tmp_path, dirs_exist_ok=True)
    if changes is None:
        (tmp_path / file).unlink()
    else:
        config = json.loads((tmp_path / file).read_text()) | changes
        kept = {name: value for name, value in config.items() if value is not None}
        (tmp_path / file).write_text(json.dumps(kept))
    with pytest.raises(ConvertError, match=message):
        amused.open_amused(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ("vqgan_config", {"levels": (8, 4)}, "diffusers' tokenizer has a codebook"),
        ("transformer_config", {"grid": (4, 8)}, "diffusers' images are squares"),
        ("transformer_config", {"num_layers": 3}, "transformer lacks 17 parameters: layers_2/"),
    ],
)
def test_what_diffusers_lacks_is_not_written(pipeline, tmp_path, config, changes, message):
    tensors = amused.open_amused(str(pipeline[0])).tensors
    other = configs() | {config: configs()[config].replace(**changes)}
    with pytest.raises(ConvertError, match=message):
        amused_writer.write(tmp_path, tensors, other, None)
