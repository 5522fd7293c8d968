import pathlib

import gin
import jax
import numpy as np
import pytest
import seqio

import tasks  # noqa: F401 (registers them)
from richhf_jax import errors, feedback, gin_utils, input_pipeline, preprocessors

LENGTHS = {"image": 64, "inputs": 32, "targets": 32, "heatmaps": 2, "scores": 4, "texts": 1}
ONE_HOST = seqio.ShardInfo(0, 1)


@pytest.fixture
def data_dir(sample_data_dir):
    seqio.set_tfds_data_dir_override(str(sample_data_dir))


def config(name, split="train", **lengths):
    return input_pipeline.DatasetConfig(name, {**LENGTHS, **lengths}, split, 4)


def take(cfg, count):
    return list(input_pipeline.get_dataset(cfg, ONE_HOST).take(count).as_numpy_iterator())


@pytest.mark.parametrize("variant", ["multi_head", "augmented_prompt"])
def test_every_kind_has_a_task(variant):
    names = {f"rich_hf_18k_{variant}", *(f"rich_hf_18k_{kind}_{variant}" for kind in preprocessors.ALL_KINDS)}
    assert names <= set(seqio.TaskRegistry.names())
    assert len(names) == 8


def test_a_task_of_one_score(data_dir):
    (batch,) = take(config("rich_hf_18k_plausibility_multi_head"), 1)
    assert batch["score_weights"].tolist() == [[1, 0, 0, 0]] * 4
    assert not batch["heatmap_weights"].any()
    assert not batch["decoder_loss_weights"].any()
    (whole,) = take(config("rich_hf_18k_multi_head"), 1)
    np.testing.assert_array_equal(batch["score_targets"], whole["score_targets"])
    np.testing.assert_array_equal(batch["image"], whole["image"])
    assert whole["score_weights"].all()


@pytest.mark.parametrize(("name", "prompts"), [("rahf_pretrain", 1), ("rahf_pretrain_augmented_prompt", 1)])
def test_pretraining_mixes_captions_and_keywords(data_dir, name, prompts):
    gin.bind_parameter("tasks.providers.caption_rate.rate", 3.0)
    cfg = config(name, heatmaps=0, scores=0)
    batches = take(cfg, 25)
    tokens = np.concatenate([batch["encoder_input_tokens"] for batch in batches])
    assert tokens.shape == (100, prompts, 32)
    vocabulary = seqio.get_mixture_or_task(name).output_features["inputs"].vocabulary
    texts = [vocabulary.decode(row[row > 1].tolist()) for row in tokens[:, 0]]
    captions = sum(text.startswith(feedback.CAPTION_TASK_STRING) for text in texts)
    # Three of four examples in a block of 1,000 are captions; 100 of the block are drawn without replacement.
    assert 60 <= captions <= 90
    assert all(batch["decoder_loss_weights"].any((1, 2)).all() for batch in batches)


def test_rahf_pretrain_plus_trains_six_steps(data_dir, random_values):
    paths = [str(pathlib.Path(__file__).parents[1]), *gin_utils.DEFAULT_SEARCH_PATHS]
    settings = {"TEXT_LENGTH": 24, "TARGET_LENGTH": 24, "SCAN_LAYERS": False, "VOCABULARY": None}
    settings |= {"MODEL_DIR": "none"}
    bindings = [f"{name} = {value!r}" for name, value in settings.items()]
    files = ["experiments/rahf_pretrain_plus.gin", "small.gin"]
    gin_utils.parse_gin_flags(paths, files, [*bindings, "T5Config.vocab_size = 512"])
    model = gin_utils.macro("MODEL")
    lengths = gin_utils.macro("TASK_FEATURE_LENGTHS")
    batches = take(config(gin_utils.macro("MIXTURE_OR_TASK_NAME"), **lengths), 6)
    # Corrupted captions and feedback train scores, painted flaws a heatmap; rahf_pretrain has neither.
    weights = sum(batch["score_weights"].sum(0) for batch in batches)
    alignment = feedback.SCORES.index(feedback.ALIGNMENT)
    assert weights[alignment] > weights[feedback.SCORES.index(feedback.PLAUSIBILITY)] > 0
    weights = sum(batch["heatmap_weights"].sum(0) for batch in batches)
    implausibility = feedback.HEATMAPS.index(feedback.IMPLAUSIBILITY)
    assert weights[implausibility] > 0

    @jax.jit
    def step(params, batch):
        (loss, metrics), slopes = jax.value_and_grad(model.loss_fn, has_aux=True)(params, batch, None)
        return loss, metrics, jax.tree.map(lambda value, slope: value - 1e-3 * slope, params, slopes)

    shapes = {name: array.shape for name, array in batches[0].items()}
    tree = jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), shapes))
    first = params = random_values(tree["params"])
    for batch in batches:
        loss, metrics, params = step(params, batch)
        assert np.isfinite(loss)
    assert {"loss/score", "loss/keywords"} <= metrics.keys()
    changed = jax.tree.map(lambda before, after: bool((before != after).any()), first, params)
    trained = {name for name, values in changed.items() if all(jax.tree.leaves(values))}
    scores = (feedback.PLAUSIBILITY, feedback.ALIGNMENT, feedback.AESTHETICS)
    heads = {f"heatmap_head_{feedback.IMPLAUSIBILITY}", *(f"score_head_{kind}" for kind in scores)}
    assert {name for name in trained if "head" in name} == heads


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("rich_hf_18k_multi_head", "python -m richhf_jax.datasets.rich_hf_18k "),
        ("web_captions", "python -m richhf_jax.datasets.web_captions "),
        ("coco_captions", "tfds build coco_captions "),
    ],
)
def test_data_that_is_not_built(tmp_path, monkeypatch, name, command):
    loader = seqio.get_mixture_or_task(name).source.tfds_dataset
    # A loader remembers the folder of its first use.
    monkeypatch.setattr(loader, "_data_dir_override", str(tmp_path))
    with pytest.raises(errors.UserError, match=rf"{name}: its data, {loader.name}.*\n *{command}"):
        take(config(name), 1)


def test_a_split_that_was_not_built(data_dir):
    with pytest.raises(
        errors.UserError, match=r"web_captions: .* without a split 'validation', it has train"
    ):
        take(config("web_captions", split="validation"), 1)
