"""Compares the network's parts with the whole, and counts the convolutions that loops leave to compile."""

import gin
import jax
import numpy as np
import pytest

from richhf_jax import gin_utils, precompile
from richhf_jax.costs import parts

SEARCH_PATHS = (*gin_utils.DEFAULT_SEARCH_PATHS, "tests")
FILES = (
    "models/rahf.gin",
    "tests/small.gin",
    "variants/multi_head.gin",
    "runs/train.gin",
    "augmentation/default.gin",
)
GIVEN = ("MODEL_DIR = 'none'", "MIXTURE_OR_TASK_NAME = 'none'", "TRAIN_STEPS = 1", "BATCH_SIZE = 2")
# A heatmap head with two equal layers in a row.
LAYERS = (
    "rahf.HeadsConfig.heatmap_layers = (('conv', 6, 3), ('deconv', 6, 3), ('conv', 6, 3), ('conv', 6, 3))"
)


@pytest.fixture
def make():
    """Returns a function that makes a small model, its parameters' shapes and a batch's."""

    def made(*bindings):
        gin.clear_config()
        gin_utils.parse_gin_flags(SEARCH_PATHS, FILES, [*GIVEN, *bindings])
        model, batch = gin_utils.macro("MODEL"), precompile.step_shapes("train")
        shapes = {name: array.shape for name, array in batch.items()}
        variables = jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), shapes))
        return model, variables["params"], batch

    return made


def test_the_parts_compute_what_the_network_computes(make):
    model, shapes, batch = make()
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.3).astype(leaf.dtype), shapes)
    image = rng.integers(0, 256, batch["image"].shape, np.uint8)
    prompts, targets = (
        rng.integers(1, 32, batch[name].shape, np.int32)
        for name in ("encoder_input_tokens", "decoder_target_tokens")
    )

    @jax.jit
    def both(params):
        by_name = {part.name: part for part in parts.of_network(model.module, params, batch)}

        def run(name, *inputs):
            return by_name[name].fn(by_name[name].params, *inputs)

        encoded = run("ViT and encoder", image, prompts)
        rows = targets.reshape(-1, targets.shape[-1])
        apart = {
            "heatmaps": run("2 heatmap heads", encoded),
            "scores": run("4 score heads", encoded),
            "logits": run("decoder", encoded.last(1), rows, rows)[:, None],
        }
        whole = model.module.apply(
            {"params": params},
            *(image, prompts, targets, targets),
            num_heatmaps=2,
            num_scores=4,
            enable_dropout=False,
        )
        return apart, whole, run("heatmap head", encoded), run("score head", encoded)

    apart, whole, heatmap, score = both(params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), apart, whole)
    np.testing.assert_allclose(heatmap, whole["heatmaps"][:, :1], rtol=1e-5)
    np.testing.assert_allclose(score, whole["scores"][:, :1], rtol=1e-5)


def test_in_loops_each_convolution_of_the_heads_is_compiled_once(make):
    def counts(scanned, platform):
        model, shapes, batch = make(LAYERS, f"SCAN_LAYERS = {scanned}")
        of_network = parts.of_network(model.module, shapes, batch)
        [heads] = (part for part in of_network if part.name == "2 heatmap heads")
        return {name: one.count for name, one in parts.convolutions(heads, platform).items()}

    apart, in_loops = counts(False, "gpu"), counts(True, "gpu")
    assert in_loops.keys() == apart.keys()
    # 3 different layers and the output, each with two gradients.
    assert len(in_loops) == 3 * 4
    assert set(in_loops.values()) == {1}
    # Two heads of 4 layers and the output.
    assert sum(apart.values()) == 2 * 3 * 5
    same = "output, f32[2,16,16,6] * f32[3,3,6,6] -> f32[2,16,16,6]"
    assert apart[same] == 2 * 2
    # A CPU computes a deconvolution as four convolutions.
    assert len(counts(True, "cpu")) == 3 * (4 + 3)
