"""CLIP's systems: losses; evaluation, prediction and training of small ones from a converted checkpoint."""

import functools
import io
import json
import pathlib
import runpy
import shutil
import sys

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio
import torch
import transformers
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

import tasks  # noqa: F401 (registers them)
from richhf_jax import RahfPredictor, clip_tokens, errors, feedback, gin_utils, losses, model_description
from richhf_jax.convert import __main__ as command
from richhf_jax.export import __main__ as export
from tasks import vocabulary

torch.set_num_threads(1)
TASK = "synthetic_rich_hf_multi_head"
# clip_tiny.gin's sizes, but one layer a tower.
TEXT = {"vocab_size": 774, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 1}
TEXT |= {"num_attention_heads": 4, "max_position_embeddings": 24, "bos_token_id": 772, "eos_token_id": 773}
VISION = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 4}
VISION |= {"image_size": 64, "patch_size": 8}
BINDINGS = ("clip.TextConfig.num_layers = 1", "clip.VisionConfig.num_layers = 1")


@functools.cache
def transformers_model():
    torch.manual_seed(0)
    text, vision = (sizes | {"hidden_act": "gelu"} for sizes in (TEXT, VISION))
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Saves a small CLIP with its vocabulary, as a hub has it."""
    folder = tmp_path_factory.mktemp("clip")
    transformers_model().save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(clip_tokens.read(vocabulary.SMALL_CLIP).content)
    return folder


def configure(system, *bindings, runs=()):
    gin.clear_config()
    files = [f"models/{system}.gin", "sizes/clip_tiny.gin", *(f"runs/{run}.gin" for run in runs)]
    gin_utils.parse_gin_flags(gin_utils.DEFAULT_SEARCH_PATHS, files, [*BINDINGS, *bindings])
    return gin_utils.macro("MODEL")


@pytest.fixture(scope="module")
def converted(weights, tmp_path_factory):
    """Converts it to a model directory of each system."""

    @functools.cache
    def make(system):
        model = configure(system)
        to = str(tmp_path_factory.mktemp(system) / "model")
        lengths = {"image": 64, "inputs": 24, "targets": 8}
        fit = gin_utils.macro("FIT")
        description = command.describe(model, [str(weights)], lengths, str(weights), False, fit)
        command.convert(model, [str(weights)], to, description=description)
        gin.clear_config()
        return to

    return make


@pytest.fixture(scope="module")
def pairs():
    """Makes 1,000 pictures of any shape, as PNG, with prompts."""
    rng = np.random.default_rng(0)
    words = "a red star blue circle two large cats and 3 dogs, naïve 猫 left of".split()  # noqa: SIM905
    made = []
    for _ in range(1000):
        size = rng.integers(30, 150, 2)
        file = io.BytesIO()
        coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size.tolist(), Image.Resampling.BILINEAR).save(file, "PNG")
        made.append((file.getvalue(), " ".join(rng.choice(words, rng.integers(1, 30)))))
    return made


@pytest.fixture(scope="module")
def cosines(weights, pairs):
    """Computes the pairs' cosines by transformers' own model, processor and tokenizer."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(weights)
    tokens = tokenizer(
        [prompt for _, prompt in pairs], padding=True, truncation=True, max_length=24, return_tensors="pt"
    )
    processor = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=64)
    images = [Image.open(io.BytesIO(image)) for image, _ in pairs]
    with torch.no_grad():
        outputs = transformers_model()(**tokens, **processor(images, return_tensors="pt"))
    return (outputs.image_embeds * outputs.text_embeds).sum(-1).numpy()


@pytest.mark.parametrize("system", ["clip_score", "pickscore"])
def test_predictions_are_those_of_transformers(system, converted, weights, pairs, cosines):
    predictor = RahfPredictor.from_checkpoint(converted(system), batch_size=50)
    images, prompts = zip(*pairs, strict=True)
    found = predictor(images, prompts)
    assert np.ptp(cosines) > 0.1
    kinds = feedback.SCORES if system == "pickscore" else (feedback.ALIGNMENT,)
    for prediction, cosine in zip(found, cosines, strict=True):
        assert prediction.scores == pytest.approx(dict.fromkeys(kinds, cosine), abs=1e-5)
        assert not prediction.heatmaps
        assert prediction.tokens is None
        assert set(prediction.to_dict()) <= {"id", "prompt", "scores", "prompt_words_cut"}
    too_long = [len(clip_tokens.read(weights).pieces(prompt)) > 22 for prompt in prompts]
    assert [prediction.words_cut > 0 for prediction in found] == too_long
    assert any(too_long)
    # Another order, and batches of other sizes.
    alone = RahfPredictor.from_checkpoint(converted(system), batch_size=3)
    again = alone(images[::-1][:10], prompts[::-1][:10])
    for one, two in zip(again, found[::-1][:10], strict=True):
        assert one.scores == pytest.approx(two.scores, abs=1e-6)


def test_a_reward_is_differentiable_and_the_score(converted, pairs):
    predictor = RahfPredictor.from_checkpoint(converted("clip_score"), batch_size=1)
    images, prompts = zip(*pairs[:3], strict=True)
    score_fn = predictor.score_fn(feedback.ALIGNMENT)
    for image, prompt, prediction in zip(images, prompts, predictor(images, prompts), strict=True):
        pixels = jnp.asarray(np.asarray(Image.open(io.BytesIO(image))), jnp.float32) / 255
        score, gradient = jax.value_and_grad(lambda x, prompt=prompt: score_fn(x, prompt))(pixels)
        # Pixels in between two levels aren't rounded here.
        assert score == pytest.approx(prediction.scores[feedback.ALIGNMENT], abs=2e-3)
        assert np.abs(gradient).max() > 0


PROMPTS = ("A RED Star, don't", "naïve 猫 " * 30, f"two {clip_tokens.END} cats")


def test_an_exports_example_scores_as_the_predictor_does(converted, pairs, tmp_path, monkeypatch, capsys):
    source, exported, image = tmp_path / "source", tmp_path / "exported", tmp_path / "square.png"
    shutil.copytree(converted("clip_score"), source)
    # A file with other rules, as older versions kept it.
    content = json.loads((source / "model.json").read_text())
    content.pop("checksums")
    (source / "model.json").write_text(json.dumps(content))
    rules = json.loads((source / "tokenizer.json").read_text()) | {"normalizer": None, "added_tokens": []}
    (source / "tokenizer.json").write_text(json.dumps(rules))
    export.export(str(source), "stablehlo", str(exported))
    Image.open(io.BytesIO(pairs[0][0])).resize((64, 64)).save(image)
    predictor = RahfPredictor.from_checkpoint(source)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    for prompt in PROMPTS:
        expected = predictor(image, prompt).scores
        assert expected == RahfPredictor.from_checkpoint(converted("clip_score"))(image, prompt).scores
        monkeypatch.setattr(sys, "argv", ["example.py", str(image), prompt])
        capsys.readouterr()
        example = runpy.run_path(str(exported / "example.py"), run_name="__main__")
        assert json.loads(capsys.readouterr().out)["scores"] == pytest.approx(expected, abs=1e-6)
        ids = predictor.description.encoder.encode([prompt], 24)[0][0]
        assert example["tokens"](prompt) == ids.tolist()
    interface = json.loads((exported / "interface.json").read_text())
    assert (interface["start_id"], interface["end_id"], interface["padding_id"]) == (772, 773, 0)
    card = " ".join((exported / "MODEL_CARD.md").read_text().split())
    assert "of each prompt the id 772 (`<|startoftext|>`), then the pieces that `tokenizers.Tok" in card
    assert "cut after 22, then the id 773 (`<|endoftext|>`), padded with 0 to 24." in card


def test_the_gradients_heatmap_has_the_pictures_shape(converted, pairs):
    predictor = RahfPredictor.from_checkpoint(converted("clip_gradient"), batch_size=4)
    images, prompts = zip(*pairs[:4], strict=True)
    for image, prediction in zip(images, predictor(images, prompts), strict=True):
        heatmap = prediction.heatmaps[feedback.MISALIGNMENT]
        assert heatmap.shape == Image.open(io.BytesIO(image)).size[::-1]
        assert 0 <= heatmap.min() < 0.1 < 0.9 < heatmap.max() <= 1
        assert not prediction.scores


def evaluate(system, directory, synthetic_data_dir, *bindings):
    seqio.set_tfds_data_dir_override(str(synthetic_data_dir))
    configure(
        system,
        f"MODEL_DIR = '{directory}'",
        f"MIXTURE_OR_TASK_NAME = '{TASK}'",
        "EVAL_BATCH_SIZE = 4",
        *bindings,
        runs=["eval"],
    )
    metrics = gin.get_configurable("eval_script.evaluate")()
    (place,) = pathlib.Path(directory).rglob("predictions.jsonl")
    return metrics, [json.loads(line) for line in place.read_text().splitlines()]


@pytest.mark.parametrize(
    ("system", "scores", "heatmaps"),
    [
        ("clip_score", [feedback.ALIGNMENT], []),
        ("pickscore", feedback.SCORES, []),
        ("clip_gradient", [], [feedback.MISALIGNMENT]),
    ],
)
def test_evaluation_off_the_shelf(system, scores, heatmaps, converted, synthetic_data_dir):
    metrics, lines = evaluate(system, converted(system), synthetic_data_dir)
    assert len(lines) == 8
    kinds = {name.split("/")[2] for name in metrics if name.startswith("score/plcc/")}
    assert kinds == set(scores)
    assert {name for name in metrics if name.startswith("heatmap")} or not heatmaps
    assert not [name for name in metrics if name.startswith("keywords")]
    assert all(set(line.get("scores", {})) == set(scores) for line in lines)
    predictor = RahfPredictor.from_checkpoint(converted(system))
    assert set(predictor.description.model.outputs.scores) == set(scores)


def test_a_vocabulary_of_another_kind_is_refused(converted, synthetic_data_dir):
    with pytest.raises(errors.UserError, match="tokens, the model 774; set VOCABULARY to the model's tok"):
        evaluate("clip_score", converted("clip_score"), synthetic_data_dir, "VOCABULARY = None")


def train(system, model_dir, synthetic_data_dir, *bindings, steps=6, task=TASK):
    seqio.set_tfds_data_dir_override(str(synthetic_data_dir))
    sizes = "BATCH_SIZE = 8", f"TRAIN_STEPS = {steps}", "EVAL_PERIOD = 6", "EVAL_STEPS = 1", "LOG_PERIOD = 3"
    rates = "WARMUP_STEPS = 2", "BASE_LEARNING_RATE = 0.002"
    configure(
        system,
        f"MODEL_DIR = '{model_dir}'",
        f"MIXTURE_OR_TASK_NAME = '{task}'",
        *sizes,
        *rates,
        *bindings,
        runs=["train"],
    )
    gin.get_configurable("train_script.train")()


def test_clip_is_finetuned_from_a_converted_checkpoint(converted, synthetic_data_dir, tmp_path, pairs):
    start = f"INITIAL_CHECKPOINT_PATH = '{converted('clip_score')}'"
    train("clip_finetuned", tmp_path, synthetic_data_dir, start)
    assert model_description.read(tmp_path).system == "clip_finetuned"
    predictor = RahfPredictor.from_checkpoint(str(tmp_path), batch_size=4)
    assert predictor.description.fit == "centre_crop"
    images, prompts = zip(*pairs[:4], strict=True)
    for prediction in predictor(images, prompts):
        assert list(prediction.scores) == list(feedback.SCORES)
        assert all(0 < score < 1 for score in prediction.scores.values())
    metrics, lines = evaluate("clip_finetuned", tmp_path, synthetic_data_dir)
    assert len(lines) == 8
    assert f"score/plcc/{feedback.OVERALL}" in metrics


def test_contrastive_training_gives_clip_score(synthetic_data_dir, tmp_path):
    train("clip_contrastive", tmp_path, synthetic_data_dir, task="synthetic_captions")
    assert model_description.read(tmp_path).system == "clip_score"
    evaluate("clip_score", tmp_path, synthetic_data_dir)


def embeddings(rng, count):
    made = rng.standard_normal((2, count, 6)).astype(np.float32)
    return made / np.linalg.norm(made, axis=-1, keepdims=True)


def test_the_contrastive_loss_is_that_of_transformers(rng):
    image, text = embeddings(rng, 8)
    each, right = losses.contrastive(image, text, jnp.float32(12.0))
    similarity = 12 * torch.tensor(text @ image.T)
    np.testing.assert_allclose(each.mean(), image_text_contrastive_loss(similarity), rtol=1e-5)
    assert right.tolist() == (np.argmax(image @ text.T, axis=1) == np.arange(8)).tolist()


def test_the_contrastive_loss_is_over_the_whole_batch_wherever_it_is_split(rng):
    image, text = embeddings(rng, 8)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))

    def total(image, text):
        return losses.contrastive(image, text, jnp.float32(12.0))[0].sum()

    whole = jax.value_and_grad(total)(image, text)
    parts = jax.jit(jax.value_and_grad(total))(jax.device_put(image, split), jax.device_put(text, split))
    for one, two in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


def test_the_logits_factor_counts_to_100(rng):
    image, text = embeddings(rng, 4)
    limited, more = (losses.contrastive(image, text, jnp.float32(scale))[0] for scale in (100.0, 200.0))
    np.testing.assert_array_equal(limited, more)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"encoder_input_tokens": (1, 7, 24)}, "CLIP reads one prompt an image, but the data have 7"),
        ({"encoder_input_tokens": (1, 1, 25)}, "TEXT_LENGTH .* is 25, but .* has 24 rows"),
        ({"image": (1, 72, 72, 3)}, "images have 72x72 pixels, but the image tower is for 64x64"),
    ],
)
def test_batches_that_do_not_fit(shapes, message):
    model = configure("clip_score")
    with pytest.raises(errors.UserError, match=message):
        model.get_initial_variables(jax.random.key(0), model.input_shapes | shapes)
