"""The predictor: inputs as in training, batches that change nothing, records, differentiable scores."""

import dataclasses
import functools
import io
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from PIL import Image

from richhf_jax import RahfPredictor, RichFeedback, errors, feedback, model_description
from richhf_jax.inputs import images
from richhf_jax.predict import forward, predictor

PROMPT = "a red circle, and two blue stars"
WORDS = ["a", "one", "two", "red", "blue", "circle", "star", "ring", "of", "drawing,", '"big"', "Ünï", "x"]


@pytest.fixture(scope="module")
def loaded(model_dir):
    return RahfPredictor.from_checkpoint(model_dir, batch_size=8)


def pictures(rng, count, size=(40, 48)):
    return [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for _ in range(count)]


def prompts(rng, count, words=9):
    return [" ".join(rng.choice(WORDS, rng.integers(1, words))) for _ in range(count)]


def png(image, **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", **options)
    return buffer.getvalue()


def assert_close(found, expected, atol=1e-5):
    """Two predictions of an image agree."""
    assert [found.id, found.prompt, found.labels] == [expected.id, expected.prompt, expected.labels]
    for kind in feedback.SCORES:
        assert found.scores[kind] == pytest.approx(expected.scores[kind], abs=atol)
    for kind in feedback.HEATMAPS:
        np.testing.assert_allclose(found.heatmaps[kind], expected.heatmaps[kind], atol=atol)
    for mine, other in zip(found.tokens, expected.tokens, strict=True):
        assert mine.text == other.text
        assert mine.probability == pytest.approx(other.probability, abs=atol)


# What goes in.


@pytest.mark.parametrize("variant", feedback.VARIANTS)
@pytest.mark.parametrize("fit", ["resize", "letterbox"])
def test_inputs_are_the_trainings(make_model_dir, synthetic_data_dir, variant, fit):
    import gin
    import seqio
    import tensorflow_datasets as tfds

    import tasks  # noqa: F401 (registers them)
    from richhf_jax import input_pipeline

    seqio.set_tfds_data_dir_override(str(synthetic_data_dir))
    gin.bind_parameter("richhf_jax.augmentation.show.fit", fit)
    lengths = {"image": 32, "inputs": 24, "targets": 24, "heatmaps": 2, "scores": 4, "texts": 1}
    cfg = input_pipeline.DatasetConfig(f"synthetic_rich_hf_{variant}", lengths, "train", 8, shuffle=False)
    _, batch = next(input_pipeline.evaluation_batches(cfg, seqio.ShardInfo(0, 1)))
    builder = tfds.builder("synthetic_rich_hf/default", data_dir=synthetic_data_dir, try_gcs=False)
    raw = builder.as_dataset("train", decoders={"image": tfds.decode.SkipDecoding()}, shuffle_files=False)
    mine = RahfPredictor.from_checkpoint(make_model_dir(variant, fit))
    for row, example in enumerate(raw.take(8).as_numpy_iterator()):
        found = mine.prepare(example["image"], example["prompt"].decode())
        np.testing.assert_array_equal(found.square, batch["image"][row])
        np.testing.assert_array_equal(found.inputs, batch["encoder_input_tokens"][row])
        if fit == "letterbox":
            np.testing.assert_array_equal(found.box, batch["image_box"][row])


def test_texts_are_encoded_and_cut_as_in_training(loaded, rng):
    from richhf_jax import preprocessors
    from tasks import vocabulary

    texts = [*prompts(rng, 200, 40), "", " ", "\u00a0a\u00a0b " * 20, "x" * 300, "a\tb\nc " * 30]
    for text in texts:
        expected, cut = preprocessors.encode(np.array([text]), 24, vocabulary.get_vocabulary())
        found, words_cut = loaded.encode([text])
        np.testing.assert_array_equal(found, expected)
        assert words_cut == cut
        # It says so if anything is cut, also within the first word.
        assert (words_cut > 0) == (len(vocabulary.get_vocabulary().encode(text)) > 23)
    assert sum(loaded.encode([text])[1] > 0 for text in texts) > 50


def test_every_form_of_an_image_is_the_same(loaded, rng, tmp_path):
    [image] = pictures(rng, 1)
    path = tmp_path / "image.png"
    path.write_bytes(png(image))
    data = png(image)
    forms = [image, Image.fromarray(image), path, str(path), data, bytearray(data), memoryview(data)]
    forms.append(jnp.asarray(image))
    for form in forms:
        np.testing.assert_array_equal(loaded.prepare(form, "a").image, image)
    np.testing.assert_array_equal(loaded.prepare(image[..., 0], "a").image, image[..., :1].repeat(3, -1))
    half = np.full((40, 48, 1), 128, np.uint8)
    clear = Image.fromarray(np.concatenate([image, half], -1))
    buffer = io.BytesIO()
    clear.save(buffer, "PNG")
    np.testing.assert_array_equal(
        loaded.prepare(clear, "a").image, loaded.prepare(buffer.getvalue(), "a").image
    )


@pytest.mark.parametrize(
    ("picture", "prompt", "message"),
    [
        (b"", "a", "no bytes"),
        (b"<html></html>", "a", "HTML page"),
        ("nowhere.png", "a", "nowhere.png: No such file"),
        (np.zeros((1, 1, 3), np.uint8), "a", "1 x 1 pixels; 8"),
        (np.zeros((9, 9, 3), np.float32), "a", "must be uint8"),
        (np.zeros((9, 9, 4), np.uint8), "a", "must be uint8"),
        (Image.new("CMYK", (9, 9)), "a", "in CMYK"),
        (Image.new("I;16", (9, 9)), "a", "16 bits"),
        (np.zeros((9, 9, 3), np.uint8), "a " * 5000, "5,000 words; at most 1,000"),
        (np.zeros((9, 9, 3), np.uint8), "a," * 5000, "5,000 words; at most 1,000"),
        (np.zeros((9, 9, 3), np.uint8), "a\n" * 5000, "5,000 words; at most 1,000"),
        (np.zeros((9, 9, 3), np.uint8), "." * 10_001, "10,001 characters; at most 10,000"),
        (np.zeros((9, 9, 3), np.uint8), " \n", "the prompt is empty"),
        (np.zeros((9, 9, 3), np.uint8), "\ud800", "isn't valid Unicode"),
    ],
)
def test_what_cannot_be_scored_is_told(loaded, picture, prompt, message):
    with pytest.raises(predictor.PredictionError, match=message):
        loaded(picture, prompt)
    name = picture if isinstance(picture, str) else "1"
    with pytest.raises(predictor.PredictionError, match=f"^{name}: .*{message}"):
        loaded([np.zeros((9, 9, 3), np.uint8), picture], ["a", prompt])


@pytest.mark.parametrize("wrong", [5, None, 1.5])
def test_an_image_that_is_none(loaded, no_shape_checks, wrong):
    message = f"0: an image must be a PIL image, .*, got {type(wrong).__name__}"
    for given, texts in ((wrong, "a"), ([wrong], ["a"])):
        with pytest.raises(predictor.PredictionError, match=message):
            loaded(given, texts)
    with pytest.raises(predictor.PredictionError, match="one image and one prompt"):
        loaded([b""], wrong)


def test_a_file_that_is_open_is_none(loaded, no_shape_checks, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with (tmp_path / "a.png").open("rb") as file:
        for wrong, kind in ((file, "BufferedReader"), (io.BytesIO(), "BytesIO")):
            with pytest.raises(predictor.PredictionError, match=f"or a file's bytes, got {kind}"):
                loaded(wrong, "a")
    with pytest.raises(predictor.PredictionError, match="as many prompts as images; got generator and str"):
        loaded((image for image in [b""]), "a")


def test_a_pipe_is_no_image(loaded, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(predictor.PredictionError, match="not a file"):
        loaded(tmp_path / "pipe.png", "a")


@pytest.mark.parametrize("text", ["", "a " * 2000])
def test_score_fn_takes_the_same_prompts(loaded, text):
    with pytest.raises(predictor.PredictionError, match="the prompt is empty|2,000 words"):
        loaded.encode_for(feedback.ALIGNMENT, text)


def test_a_prompt_that_is_none(loaded, rng, no_shape_checks):
    with pytest.raises(predictor.PredictionError, match="1: a prompt must be a str, got NoneType"):
        loaded(pictures(rng, 2), ["a", None])


def test_a_picture_in_memory_whose_file_is_cut_off(loaded, rng):
    data = png(pictures(rng, 1)[0])
    with pytest.raises(predictor.PredictionError, match="0: broken PNG"):
        loaded([Image.open(io.BytesIO(data[: len(data) // 2]))], ["a"])


def test_one_array_of_many_images_and_ids_of_any_kind(loaded, rng):
    given = np.stack(pictures(rng, 2))
    records = loaded(given, ["a", "b"], np.array(["x", "y"]))
    assert [record.id for record in records] == ["x", "y"]
    for same in (list(given), jnp.asarray(given), list(jnp.asarray(given))):
        assert records[1].scores == loaded(same, ["a", "b"])[1].scores


def test_images_of_other_kinds_where_they_may_be_converted(model_dir):
    willing = RahfPredictor.from_checkpoint(model_dir, convert=True)
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert (willing.prepare(buffer.getvalue(), "a").image == (255, 0, 0)).all()
    assert willing.prepare(Image.new("CMYK", (9, 9)), "a").image.shape == (9, 9, 3)
    with pytest.raises(images.ImageError, match="an animation of 2 frames"):
        images.decode(buffer.getvalue(), convert=False)


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ([np.zeros((9, 9, 3), np.uint8)], "a"),
        (np.zeros((9, 9, 3), np.uint8), ["a"]),
        ([np.zeros((9, 9, 3), np.uint8)], ["a", "b"]),
    ],
)
def test_as_many_prompts_as_images(loaded, given, texts):
    with pytest.raises(predictor.PredictionError, match="prompt"):
        loaded(given, texts)


# What comes out.


def test_records(loaded, rng):
    [image] = pictures(rng, 1)
    found = loaded(image, PROMPT, "mine.png")
    assert isinstance(found, RichFeedback)
    assert (found.id, found.prompt) == ("mine.png", PROMPT)
    assert list(found.scores) == list(feedback.SCORES)
    assert all(0 <= score <= 1 for score in found.scores.values())
    assert list(found.heatmaps) == list(feedback.HEATMAPS)
    for heatmap in found.heatmaps.values():
        assert (heatmap.shape, heatmap.dtype) == ((40, 48), np.float32)
        assert heatmap.min() >= 0
        assert heatmap.max() <= 1
    assert [token.text for token in found.tokens] == feedback.tokenize_prompt(PROMPT)
    for token in found.tokens:
        assert token.misaligned == (token.probability > 0.5)
    assert json.loads(json.dumps(found.to_dict()))["id"] == "mine.png"
    assert found.overlay().size == found.overlay(feedback.HEATMAPS[0]).size == (48, 40)
    assert (np.asarray(found.overlay(opacity=0)) == image).all()


def test_outputs_are_the_models_own(loaded, model_dir, rng):
    """The predictions equal those of the network's own call."""
    description = model_description.read(model_dir)
    image = pictures(rng, 1, (32, 32))[0]
    found = loaded(image, PROMPT)
    prepared = loaded.prepare(image, PROMPT)
    target = np.zeros((1, 1, 24), np.int32)
    apply = functools.partial(description.network.apply, num_heatmaps=2, num_scores=4, enable_dropout=False)
    given = image[None], prepared.inputs[None], target, target
    outputs = jax.jit(apply)({"params": loaded.params}, *given)
    np.testing.assert_allclose(list(found.scores.values()), outputs["scores"][0], atol=1e-5)
    np.testing.assert_allclose(list(found.heatmaps.values()), outputs["heatmaps"][0], atol=1e-5)


def test_a_prompt_that_is_too_long_is_cut_and_says_so(loaded, rng):
    [image] = pictures(rng, 1)
    found = loaded(image, "one red star " * 30)
    assert found.words_cut > 0
    assert found.to_dict()["prompt_words_cut"] == found.words_cut
    assert len(found.tokens) == 90
    decided = [token.probability is not None for token in found.tokens]
    assert 0 < sum(decided) < 30
    assert decided == sorted(decided, reverse=True)
    assert loaded(image, PROMPT).words_cut == 0


@pytest.mark.parametrize(
    ("output", "place"), [("scores", (1, 0)), ("heatmaps", (1, 0, 3, 3)), ("keyword_probability", (1, 0))]
)
def test_outputs_that_are_not_finite_are_no_record(loaded, rng, monkeypatch, output, place):
    run = loaded.run

    def damaged(features):
        outputs = dict(run(features))
        return outputs | {output: outputs[output].at[place].set(np.nan)}

    monkeypatch.setattr(loaded, "run", damaged)
    with pytest.raises(predictor.PredictionError, match="^y: the model's .* aren't finite numbers"):
        loaded(pictures(rng, 2), [PROMPT, PROMPT], ["x", "y"])
    assert loaded(pictures(rng, 1), [PROMPT])[0].scores


@pytest.mark.parametrize("variant", feedback.VARIANTS)
def test_batch_size_and_order_change_no_result(make_model_dir, rng, variant):
    directory = make_model_dir(variant)
    given, texts = pictures(rng, 7), prompts(rng, 7)
    names = [str(i) for i in range(7)]
    large = RahfPredictor.from_checkpoint(directory, batch_size=16)
    expected = large(given, texts, names)
    order = rng.permutation(7)
    shuffled = large([given[i] for i in order], [texts[i] for i in order], [names[i] for i in order])
    one_by_one = [large(*one) for one in zip(given, texts, names, strict=True)]
    threes = RahfPredictor.from_checkpoint(directory, batch_size=3)(given, texts, names)
    for i, record in enumerate(expected):
        assert_close(shuffled[list(order).index(i)], record)
        assert_close(one_by_one[i], record)
        assert_close(threes[i], record)
    # The records differ from each other by more than that.
    assert np.std([record.scores[feedback.OVERALL] for record in expected]) > 1e-3


def test_no_more_programs_than_sizes(model_dir, rng):
    fresh = RahfPredictor.from_checkpoint(model_dir, batch_size=8)
    for count in (1, 2, 3, 5, 8, 11, 7):
        fresh(pictures(rng, count, (9 + count, 10)), prompts(rng, count, 30))
    assert fresh._predict._jitted._cache_size() == len(fresh._sizes.sizes) == 2


def test_bfloat16_is_close(model_dir, loaded, rng):
    coarse = RahfPredictor.from_checkpoint(model_dir, batch_size=8, dtype="bfloat16")
    given, texts = pictures(rng, 8), prompts(rng, 8)
    differences, words = [], []
    for mine, other in zip(coarse(given, texts), loaded(given, texts), strict=True):
        differences += [abs(mine.scores[kind] - other.scores[kind]) for kind in feedback.SCORES]
        differences += [np.abs(mine.heatmaps[k] - other.heatmaps[k]).max() for k in feedback.HEATMAPS]
        words += [abs(a.probability - b.probability) for a, b in zip(mine.tokens, other.tokens, strict=True)]
    # bfloat16 rounds to 2^-8 = 0.004. One word decided otherwise changes all later ones, hence the mean.
    assert 1e-4 < max(differences) < 0.05
    assert np.mean(words) < 0.05


# One call, and no op too many.


@pytest.mark.parametrize("variant", feedback.VARIANTS)
def test_the_image_is_seen_once_whatever_the_prompts(make_model_dir, variant):
    description = model_description.read(make_model_dir(variant))
    side, patch = 32, description.network.vit_config.patch_size
    mine = RahfPredictor.from_checkpoint(make_model_dir(variant), batch_size=3)
    prepared = [mine.prepare(np.zeros((9, 9, 3), np.uint8), PROMPT)] * 3
    jaxpr = jax.make_jaxpr(forward.predict_fn(description))(mine.state, mine.features(prepared, 3))
    # Only the patches' product has so wide an input. It is computed once, for 3 images.
    products = [p for p in _products(jaxpr.jaxpr) if p.invars[0].aval.shape[-1] == 3 * patch**2]
    assert [p.outvars[0].aval.shape[:3] for p in products] == [(3, side // patch, side // patch)]


def _products(jaxpr):
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found.append(eqn)
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found += _products(inner)
    return found


# Guidance.


@pytest.mark.parametrize("variant", feedback.VARIANTS)
@pytest.mark.parametrize("fit", ["resize", "letterbox"])
def test_score_fn_is_the_score(make_model_dir, rng, variant, fit):
    mine = RahfPredictor.from_checkpoint(make_model_dir(variant, fit), batch_size=2)
    given, texts = pictures(rng, 2), [PROMPT, "a cat"]
    records = mine(given, texts)
    for kind in (feedback.SCORES[0], feedback.SCORES[2]):
        score = mine.score_fn(kind)
        found = score(np.float32(given) / 255, texts)
        # Resized pixels are not rounded to 8 bits here.
        np.testing.assert_allclose(found, [record.scores[kind] for record in records], atol=5e-3)
        alone = score(np.float32(given[1]) / 255, texts[1])
        np.testing.assert_allclose(alone, found[1], atol=1e-5)
        encoded = jax.jit(score)(np.float32(given) / 255, mine.encode_for(kind, texts))
        np.testing.assert_allclose(encoded, found, atol=1e-5)


def test_score_fn_has_the_gradient_of_the_score(loaded, rng):
    score = loaded.score_fn(feedback.AESTHETICS)
    image = rng.random((32, 32, 3)).astype(np.float32)
    gradient = jax.grad(score)(image, PROMPT)
    direction = np.asarray(gradient / jnp.linalg.norm(gradient))
    step = 0.05
    difference = (score(image + step * direction, PROMPT) - score(image - step * direction, PROMPT)) / (
        2 * step
    )
    np.testing.assert_allclose(difference, jnp.linalg.norm(gradient), rtol=0.05)
    assert float(jnp.linalg.norm(gradient)) > 1e-4


def test_score_fn_computes_the_one_head_alone(loaded):
    score = loaded.score_fn(feedback.ALIGNMENT)
    tokens = loaded.encode_for(feedback.ALIGNMENT, [PROMPT])
    text = (
        jax.jit(score.func)
        .lower(score.args[0], np.zeros((1, 32, 32, 3), np.float32), tokens)
        .compile()
        .as_text()
    )
    # A program's parameters are only the inputs that it uses.
    heads = [name for name in feedback.SCORES if f"score_head_{name}" in text]
    assert heads == [feedback.ALIGNMENT]


@pytest.mark.parametrize(
    ("shape", "dtype", "prompts", "message"),
    [
        ((32, 32, 3), np.uint8, "a", r"must be float .* got uint8 \(32, 32, 3\)"),
        ((3, 32, 32), np.float32, "a", r"must be float .* got float32 \(3, 32, 32\)"),
        ((2, 32, 32, 3), np.float32, "a", "one image and one prompt, or as many"),
        ((2, 32, 32, 3), np.float32, ["a"], "one image and one prompt, or as many"),
        ((32, 32, 3), np.float32, ["a"], "one image and one prompt, or as many"),
    ],
)
def test_score_fn_of_what_makes_no_sense(loaded, no_shape_checks, shape, dtype, prompts, message):
    with pytest.raises(predictor.PredictionError, match=message):
        loaded.score_fn(feedback.OVERALL)(np.zeros(shape, dtype), prompts)


def test_unknown_kinds_and_types(loaded, model_dir):
    with pytest.raises(errors.UserError, match="no score 'beauty', only plausibility"):
        loaded.score_fn("beauty")
    with pytest.raises(errors.UserError, match="dtype must be"):
        RahfPredictor.from_checkpoint(model_dir, dtype="int8")
    with pytest.raises(errors.UserError, match="batch_size"):
        RahfPredictor.from_checkpoint(model_dir, batch_size=0)


# Where the parameters are.


def test_a_checkpoint_in_the_directory(loaded, model_dir):
    named = RahfPredictor.from_checkpoint(model_dir / "checkpoint_0")
    jax.tree.map(np.testing.assert_array_equal, named.params, loaded.params)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x10\0\0\0\0\0\0\0{", "can't be read as float32"),
        ({}, "doesn't fit this model: .*: not in the checkpoint"),
    ],
)
def test_a_damaged_safetensors_file(model_dir, tmp_path, content, message):
    model_description.read(model_dir).write(tmp_path)
    content = content or safetensors.numpy.save({"a": np.zeros(3, np.float32)})
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(errors.UserError, match=message):
        RahfPredictor.from_checkpoint(tmp_path)


def test_parameters_of_half_precision_become_float32(loaded, model_dir, tmp_path):
    model_description.read(model_dir).write(tmp_path)
    flat = traverse_util.flatten_dict(jax.device_get(loaded.params), sep="/")
    halves = {name: array.astype(np.float16) for name, array in flat.items()}
    safetensors.numpy.save_file(halves | {"more": np.zeros(1, np.int8)}, tmp_path / "model.safetensors")
    found = traverse_util.flatten_dict(RahfPredictor.from_checkpoint(tmp_path).params, sep="/")
    assert found.keys() == flat.keys()
    for name, array in flat.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], array.astype(np.float16))


@pytest.mark.parametrize(
    ("remove", "message"),
    [("checkpoint_0", "no checkpoint_<step>"), ("model.json", "has no model.json")],
)
def test_a_directory_that_lacks_something(model_dir, tmp_path, remove, message):
    for path in model_dir.iterdir():
        if path.name != remove:
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(errors.UserError, match=message):
        RahfPredictor.from_checkpoint(tmp_path)


def describe_otherwise(model_dir, directory, **changes):
    """Makes a MODEL_DIR of the model's checkpoint and a description of another T5."""
    description = model_description.read(model_dir)
    t5_config = dataclasses.replace(description.network.t5_config, **changes)
    (directory / "checkpoint_0").symlink_to(model_dir / "checkpoint_0")
    dataclasses.replace(description, network=description.network.clone(t5_config=t5_config)).write(directory)


def test_a_vocabulary_of_another_model(model_dir, tmp_path):
    describe_otherwise(model_dir, tmp_path, vocab_size=446)
    with pytest.raises(errors.UserError, match="doesn't fit|has 447 pieces, the model 446"):
        RahfPredictor.from_checkpoint(tmp_path)
    with pytest.raises(errors.UserError, match="has 447 pieces, the model 446"):
        RahfPredictor(model_description.read(tmp_path), {})


def test_a_description_without_a_vocabulary(model_dir):
    description = dataclasses.replace(model_description.read(model_dir), vocabulary=None)
    with pytest.raises(errors.UserError, match="the model has no vocabulary.model"):
        RahfPredictor(description, {})


def test_a_description_of_another_size(model_dir, tmp_path):
    describe_otherwise(model_dir, tmp_path, mlp_dim=40)
    with pytest.raises(errors.UserError, match="doesn't fit this model"):
        RahfPredictor.from_checkpoint(tmp_path)


def test_a_description_of_no_network(model_dir, tmp_path):
    describe_otherwise(model_dir, tmp_path, mlp_activations=("foo",))
    with pytest.raises(errors.UserError, match=f"{tmp_path}/model.json describes no network .*'foo'"):
        RahfPredictor.from_checkpoint(tmp_path)
