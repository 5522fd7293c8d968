"""The shipped gin files: the sizes of every experiment's batches, and which file may set what."""

import pathlib
import re

import pytest

from richhf_jax import gin_utils

GIN = pathlib.Path(gin_utils.__file__).resolve().parents[1] / "gin"

ALL_SLOTS = {"heatmaps": 2, "scores": 4, "texts": 1}
AUGMENTED_PROMPT_SLOTS = {"heatmaps": 1, "scores": 2, "texts": 1}
TEXT_SLOTS = {"heatmaps": 0, "scores": 0, "texts": 1}
TINY = {"image": 64, "inputs": 24, "targets": 24}
CLIP_TINY = {"image": 64, "inputs": 24, "targets": 8}
RESNET_TINY = {"image": 64, "inputs": 64, "targets": 64}
NO_SLOTS = {"heatmaps": 0, "scores": 0, "texts": 0}
BASE = {"image": 512, "inputs": 64, "targets": 64}
FASTER = {"relpos_bias": 10.0, "token_embedder": 10.0}
# The sizes of an experiment's examples, its slots in training, and its LEARNING_RATE_MULTIPLIERS.
EXPERIMENTS = {
    "blind_to_image": (TINY, ALL_SLOTS, FASTER),
    "blind_to_prompt": (TINY, ALL_SLOTS, FASTER),
    "quickstart": (TINY, ALL_SLOTS, FASTER),
    "quickstart_augmented_prompt": (TINY, AUGMENTED_PROMPT_SLOTS, FASTER),
    "quickstart_augmented_prompt_pretrain": (TINY, AUGMENTED_PROMPT_SLOTS, FASTER),
    "quickstart_pretrain": (TINY, ALL_SLOTS, FASTER),
    "quickstart_training": (TINY, ALL_SLOTS, FASTER),
    "rahf_pretrain": (BASE, TEXT_SLOTS, None),
    "rahf_pretrain_plus": (BASE, ALL_SLOTS, None),
    "rich_hf_18k": (BASE, ALL_SLOTS, None),
    "rich_hf_18k_augmented_prompt": (BASE, AUGMENTED_PROMPT_SLOTS, None),
    "synthetic": (TINY, ALL_SLOTS, FASTER),
    "synthetic_baselines/clip_contrastive": (CLIP_TINY, NO_SLOTS, None),
    "synthetic_baselines/clip_finetuned": (CLIP_TINY, NO_SLOTS | {"scores": 4}, None),
    "synthetic_baselines/clip_gradient": (CLIP_TINY, NO_SLOTS, None),
    "synthetic_baselines/clip_score": (CLIP_TINY, NO_SLOTS, None),
    "synthetic_baselines/resnet_heatmaps": (RESNET_TINY, NO_SLOTS | {"heatmaps": 2}, None),
    "synthetic_baselines/resnet_scores": (RESNET_TINY, NO_SLOTS | {"scores": 4}, None),
    "synthetic_pretrain_plus": (TINY, ALL_SLOTS, {"relpos_bias": 30.0, "token_embedder": 10.0}),
    "synthetic_pretrain": (TINY, ALL_SLOTS, {"relpos_bias": 30.0, "token_embedder": 10.0}),
}


def parse(*files: str, **macros) -> None:
    bindings = [f"{name} = {value!r}" for name, value in macros.items()]
    gin_utils.parse_gin_flags(gin_utils.DEFAULT_SEARCH_PATHS, files, bindings)


def files_that_match(pattern: str, folder: pathlib.Path = GIN) -> list[str]:
    """The gin files with a line that the pattern matches, comments left out."""
    texts = {str(path.relative_to(GIN)): path.read_text() for path in folder.rglob("*.gin")}
    return sorted(
        name for name, text in texts.items() if re.search(pattern, re.sub("#.*", "", text), re.MULTILINE)
    )


def test_the_table_has_every_experiment():
    folder = GIN / "experiments"
    found = {str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.gin")}
    # It has no model of its own.
    assert set(EXPERIMENTS) == found - {"synthetic_baselines/training"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_batches_of_an_experiment(name):
    given = dict.fromkeys(("MODEL_DIR", "MIXTURE_OR_TASK_NAME", "INITIAL_CHECKPOINT_PATH"), "nowhere")
    parse(f"experiments/{name}.gin", **given, TRAIN_STEPS=1)
    sizes, slots, multipliers = EXPERIMENTS[name]
    assert gin_utils.macro("TASK_FEATURE_LENGTHS") == {**sizes, **slots}
    # A ResNet is evaluated on what it trains, CLIP on scores and heatmaps; neither writes.
    evaluated = slots if "resnet" in name else {**ALL_SLOTS, "texts": int("clip" not in name)}
    assert gin_utils.macro("EVAL_FEATURE_LENGTHS") == {**sizes, **evaluated}
    assert gin_utils.macro("LEARNING_RATE_MULTIPLIERS") == multipliers


def test_one_side_and_one_slot_count_are_enough_to_change_the_batches():
    parse("models/rahf_base.gin", "variants/augmented_prompt.gin", IMAGE_SIDE=256, NUM_SCORES=3)
    sizes = {"image": 256, "inputs": 64, "targets": 64}
    assert gin_utils.macro("TASK_FEATURE_LENGTHS") == {**sizes, "heatmaps": 1, "scores": 3, "texts": 1}
    assert gin_utils.macro("EVAL_FEATURE_LENGTHS") == {**sizes, **ALL_SLOTS}


def test_the_lengths_can_be_given_whole():
    lengths = {**TINY, **TEXT_SLOTS, "inputs": 7}
    parse("models/rahf_tiny.gin", TASK_FEATURE_LENGTHS=lengths)
    assert gin_utils.macro("TASK_FEATURE_LENGTHS") == lengths
    assert gin_utils.macro("EVAL_FEATURE_LENGTHS") == {**TINY, **ALL_SLOTS}


@pytest.mark.parametrize("preset", sorted(path.name for path in (GIN / "models").glob("rahf_*.gin")))
def test_the_images_of_a_preset_fit_its_vit(preset):
    parse(f"models/{preset}")
    config = gin_utils.macro("MODEL").module.vit_config
    sides = [patches * config.patch_size for patches in config.grid]
    assert sides == [gin_utils.macro("IMAGE_SIDE")] * 2


def test_the_lengths_are_put_together_once():
    for name in ("TASK_FEATURE_LENGTHS", "EVAL_FEATURE_LENGTHS"):
        assert files_that_match(rf"^{name} = {{") == ["models/common.gin"]


def test_sizes_hold_no_settings_of_optimizers():
    assert files_that_match("LEARNING_RATE|OPTIMIZER|optimizers", GIN / "sizes") == []
    assert files_that_match("LEARNING_RATE", GIN / "experiments") != []
