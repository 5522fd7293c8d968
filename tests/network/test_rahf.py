"""The whole network, and the parameters of the shipped sizes.

The golden files hold every parameter of a size and variant. After a change that is meant, write them anew
and read the difference: `UPDATE_GOLDEN=1 python -m pytest tests/network/test_rahf.py -k golden`.
"""

import functools
import json
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from richhf_jax import feedback
from richhf_jax.network import rahf, vit

GOLDEN = pathlib.Path(__file__).parent / "golden"
SLOTS = {"multi_head": rahf.Slots(2, 4, 1), "augmented_prompt": rahf.Slots(2, 3, 2)}
INPUTS = ("image", "encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")


class Network:
    """A network of random parameters, compiled for one set of slots."""

    def __init__(self, model, params, batch, slots):
        self.module, self.params, self.slots = model.module, params, slots
        self.inputs = {name: batch[name] for name in INPUTS}
        self.compiled = jax.jit(self.forward)

    def forward(self, params, inputs):
        counts = {"num_heatmaps": self.slots.heatmaps, "num_scores": self.slots.scores}
        return self.module.apply({"params": params}, **inputs, **counts, enable_dropout=False)

    def __call__(self, params=None, **changed):
        outputs = self.compiled(params or self.params, self.inputs | changed)
        return {name: np.array(value) for name, value in outputs.items()}


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_compilation):
    pass


@pytest.fixture(scope="module")
def make_network(make_model, make_batch, random_values):
    @functools.cache
    def model_and_params(variant):
        model = make_model(variant)
        return model, random_values(initial_variables(model, 16)["params"])

    @functools.cache
    def make(variant, slots):
        model, params = model_and_params(variant)
        return Network(model, params, make_batch(model, *slots), slots)

    return make


@pytest.fixture(params=rahf.VARIANTS)
def network(request, make_network):
    return make_network(request.param, SLOTS[request.param])


@pytest.fixture
def multi_head(make_network):
    return make_network("multi_head", SLOTS["multi_head"])


@pytest.fixture
def augmented_prompt(make_network):
    return make_network("augmented_prompt", SLOTS["augmented_prompt"])


def initial_variables(model, pixels):
    """Shapes of a model's variables."""
    shapes = {
        "image": (1, pixels, pixels, 3),
        "encoder_input_tokens": (1, 1, 8),
        "decoder_input_tokens": (1, 1, 8),
    }
    return jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), shapes))


def changed_slots(before, after):
    """For each kind of output, the (example, slot) pairs that differ."""
    found = {}
    for name, value in before.items():
        difference = np.abs(value - after[name]).reshape(*value.shape[:2], -1).max(axis=-1)
        found[name] = {tuple(map(int, index)) for index in np.argwhere(difference > 1e-7)}
    return found


def all_slots(examples, slots):
    counts = {"heatmaps": slots.heatmaps, "scores": slots.scores, "logits": slots.texts}
    return {name: {(i, k) for i in examples for k in range(count)} for name, count in counts.items()}


def assert_close(outputs, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(outputs[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_outputs(network):
    outputs = network()
    shapes = {name: (value.shape, value.dtype) for name, value in outputs.items()}
    heatmaps, scores, texts = network.slots
    assert shapes == {
        "heatmaps": ((4, heatmaps, 16, 16), np.float32),
        "scores": ((4, scores), np.float32),
        "logits": ((4, texts, 5, 32), np.float32),
    }
    for name in ("heatmaps", "scores"):
        assert ((outputs[name] > 0) & (outputs[name] < 1)).all()


@pytest.mark.parametrize("variant", rahf.VARIANTS)
@pytest.mark.parametrize("kind", ["heatmaps", "scores", "texts"])
def test_a_kind_without_slots_is_absent_and_costs_nothing(make_network, variant, kind):
    network = make_network(variant, rahf.Slots(1, 1, 1)._replace(**{kind: 0}))
    parts = set()

    def note(call, args, kwargs, context):
        parts.update(context.module.path[:1])
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        outputs = jax.eval_shape(network.forward, network.params, network.inputs)
    # What computes an output, and its name.
    owners = {"heatmap_head": "heatmaps", "score_head": "scores", "decoder": "logits"}
    others = {part: name for part, name in owners.items() if name != ("logits" if kind == "texts" else kind)}
    assert set(outputs) == set(others.values())
    assert {part for part in owners if any(name.startswith(part) for name in parts)} == set(others)


def test_the_vit_runs_once_an_image_on_pixels_from_minus_one_to_one(network):
    seen = []

    def note(call, args, kwargs, context):
        if isinstance(context.module, vit.ViT):
            seen.append(args[0])
        return call(*args, **kwargs)

    def pixels(inputs):
        with nn.intercept_methods(note):
            network.forward(network.params, inputs)
        return seen

    (pixels,) = jax.jit(pixels)(network.inputs)
    np.testing.assert_allclose(pixels, network.inputs["image"] / 127.5 - 1, atol=1e-6)


def test_a_wrong_number_of_prompts_is_refused(network):
    tokens = np.repeat(network.inputs["encoder_input_tokens"], 2, axis=1)
    count = tokens.shape[1] // 2
    with pytest.raises(ValueError, match=f"takes {count} prompts an image, got {2 * count}"):
        jax.eval_shape(network.forward, network.params, network.inputs | {"encoder_input_tokens": tokens})


def test_an_unknown_variant_is_refused(multi_head):
    module = multi_head.module.clone(variant="both")
    with pytest.raises(ValueError, match="'multi_head', 'augmented_prompt'.* got 'both'"):
        module.apply({"params": multi_head.params}, **multi_head.inputs, num_heatmaps=0, num_scores=0)


def test_padding_changes_nothing(network):
    tokens = network.inputs["encoder_input_tokens"]
    padded = np.pad(tokens, ((0, 0), (0, 0), (0, 3)))
    before, after = network(), network(encoder_input_tokens=padded)
    for outputs in (before, after):
        # What stands beyond a target's end carries no weight.
        outputs["logits"][network.inputs["decoder_target_tokens"] == 0] = 0
    assert_close(after, before)


def test_examples_keep_apart(network):
    order = np.array([2, 0, 3, 1])
    permuted = network(**{name: value[order] for name, value in network.inputs.items()})
    assert_close(permuted, {name: value[order] for name, value in network().items()})


def test_every_output_sees_its_image_and_no_other(network, rng):
    image = network.inputs["image"].copy()
    image[1] = rng.integers(0, 256, image.shape[1:])
    assert changed_slots(network(), network(image=image)) == all_slots([1], network.slots)


def test_multi_head_every_output_sees_the_prompt(multi_head):
    tokens = multi_head.inputs["encoder_input_tokens"].copy()
    tokens[2, 0, :4] = 33 - tokens[2, 0, :4]
    changed = changed_slots(multi_head(), multi_head(encoder_input_tokens=tokens))
    assert changed == all_slots([2], multi_head.slots)


def test_augmented_prompt_every_output_sees_its_own_prompt(augmented_prompt):
    # Heatmap prompts first, then score prompts, then text prompts.
    owners = [
        ("heatmaps", 0),
        ("heatmaps", 1),
        *(("scores", i) for i in range(3)),
        ("logits", 0),
        ("logits", 1),
    ]
    before = augmented_prompt()
    for prompt, (name, slot) in enumerate(owners):
        tokens = augmented_prompt.inputs["encoder_input_tokens"].copy()
        tokens[2, prompt, 0] = 33 - tokens[2, prompt, 0]
        changed = changed_slots(before, augmented_prompt(encoder_input_tokens=tokens))
        assert changed == {"heatmaps": set(), "scores": set(), "logits": set()} | {name: {(2, slot)}}


def test_augmented_prompt_outputs_follow_their_prompts(augmented_prompt):
    tokens = augmented_prompt.inputs["encoder_input_tokens"]
    before = augmented_prompt()
    after = augmented_prompt(encoder_input_tokens=tokens[:, [1, 0, 4, 2, 3, 5, 6]])
    expected = {
        "heatmaps": before["heatmaps"][:, [1, 0]],
        "scores": before["scores"][:, [2, 0, 1]],
        "logits": before["logits"],
    }
    assert_close(after, expected)


def test_multi_head_every_kind_has_its_own_head(multi_head):
    before = multi_head()
    kinds = [("heatmap", "heatmaps", feedback.HEATMAPS), ("score", "scores", feedback.SCORES)]
    for prefix, name, names in kinds:
        for slot, kind in enumerate(names):
            head = f"{prefix}_head_{kind}"
            params = multi_head.params | {head: jax.tree.map(lambda x: 1.5 * x, multi_head.params[head])}
            changed = changed_slots(before, multi_head(params))
            none = {"heatmaps": set(), "scores": set(), "logits": set()}
            assert changed == none | {name: {(i, slot) for i in range(4)}}


def parameters(variables):
    """Name -> "float32 (96, 512) embed vocab"."""
    axes = traverse_util.flatten_dict(variables["params_axes"], sep="/")
    return {
        name: f"{leaf.dtype} {leaf.shape} {' '.join(map(str, axes[f'{name}_axes'].names))}"
        for name, leaf in sorted(traverse_util.flatten_dict(variables["params"], sep="/").items())
    }


@pytest.fixture(scope="module")
def shipped(make_model):
    """Makes a shipped size's model, with the shapes of its variables."""
    pixels = {"tiny": 64, "base": 512}

    @functools.cache
    def make(size, variant):
        model = make_model(variant, size=f"sizes/{size}.gin")
        return model, initial_variables(model, pixels[size])

    return make


@pytest.mark.parametrize("variant", rahf.VARIANTS)
@pytest.mark.parametrize("size", ["tiny", "base"])
def test_golden_parameters_of_the_shipped_sizes(shipped, size, variant):
    found = parameters(shipped(size, variant)[1])
    file = GOLDEN / f"{size}_{variant}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(json.dumps(found, indent=1) + "\n")
    assert found == json.loads(file.read_text())


def test_base_is_the_papers_size(shipped):
    model, variables = shipped("base", "multi_head")
    params = variables["params"]
    counts = {}
    for name, part in params.items():
        group = "t5" if name in ("token_embedder", "encoder", "decoder") else name.split("_head_")[0]
        counts[group] = counts.get(group, 0) + sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part))
    # T5 1.1 base as published. ViT-B/16: 85,798,656 without its 224-pixel position table, class token
    # and classifier, and 1,024 positions.
    assert counts["t5"] == 247_577_856
    assert counts["vit"] == 85_646_592 + 1024 * 768
    assert set(counts) == {"t5", "vit", "heatmap", "score"}

    tokens = jax.ShapeDtypeStruct((2, 1, 32), jnp.int32)
    image = jax.ShapeDtypeStruct((2, 512, 512, 3), jnp.uint8)
    outputs = jax.eval_shape(
        lambda params, *args: model.module.apply(
            {"params": params}, *args, num_heatmaps=2, num_scores=4, enable_dropout=False
        ),
        params, image, tokens, tokens, tokens,
    )  # fmt: skip
    assert {name: (value.shape, value.dtype) for name, value in outputs.items()} == {
        "heatmaps": ((2, 2, 512, 512), jnp.float32),
        "scores": ((2, 4), jnp.float32),
        "logits": ((2, 1, 32, 32128), jnp.float32),
    }
