"""The whole network, and the parameters of the presets.

The golden files hold every parameter of a preset and variant. After a change that is meant, write them anew
and read the difference: `UPDATE_GOLDEN=1 python -m pytest tests/network/test_rahf.py -k golden`.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from richhf_jax import feedback
from richhf_jax.network import heads, rahf, vit

SLOTS = {"multi_head": feedback.Slots(2, 4, 1), "augmented_prompt": feedback.Slots(2, 3, 2)}
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


@pytest.fixture(params=feedback.VARIANTS)
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
    """Lists the (example, slot) pairs that differ, for each kind of output."""
    found = {}
    for name, value in before.items():
        difference = np.abs(value - after[name]).reshape(*value.shape[:2], -1).max(axis=-1)
        found[name] = {tuple(map(int, index)) for index in np.argwhere(difference > 1e-7)}
    return found


def labelled(network, **changed):
    """The outputs, with zeros for logits beyond a target's end, which carry no weight."""
    outputs = network(**changed)
    outputs["logits"][network.inputs["decoder_target_tokens"] == 0] = 0
    return outputs


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


@pytest.mark.parametrize("variant", feedback.VARIANTS)
@pytest.mark.parametrize("kind", ["heatmaps", "scores", "texts"])
def test_a_kind_without_slots_is_absent_and_costs_nothing(make_network, variant, kind):
    network = make_network(variant, feedback.Slots(1, 1, 1)._replace(**{kind: 0}))
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
    assert_close(labelled(network, encoder_input_tokens=padded), labelled(network))


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


@pytest.fixture(scope="module")
def shipped(make_model):
    """Makes a preset's model, with the shapes of its variables."""

    @functools.cache
    def make(preset, variant, *bindings):
        model = make_model(variant, *bindings, preset=preset)
        config = model.module.vit_config
        return model, initial_variables(model, config.grid[0] * config.patch_size)

    return make


@pytest.mark.parametrize(
    ("preset", "variant", "scanned"),
    [
        ("rahf_tiny", "multi_head", False),
        ("rahf_tiny", "augmented_prompt", False),
        ("rahf_base", "multi_head", False),
        ("rahf_base", "augmented_prompt", False),
        ("rahf_base", "multi_head", True),
        ("rahf_large", "multi_head", False),
        ("rahf_pytorch_release", "multi_head", False),
    ],
)
def test_golden_parameters_of_the_presets(shipped, check_golden, preset, variant, scanned):
    variables = shipped(preset, variant, f"SCAN_LAYERS = {scanned}")[1]
    check_golden(f"{preset}_{variant}{'_scanned' if scanned else ''}", variables)


def test_base_is_the_papers_size(shipped):
    model, variables = shipped("rahf_base", "multi_head")
    params = variables["params"]
    assert all("layers" in params[stack] for stack in ("vit", "encoder", "decoder"))  # SCAN_LAYERS
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


def test_the_release_is_vit_large_and_t5_base(shipped):
    params = shipped("rahf_pytorch_release", "multi_head")[1]["params"]
    counts = {
        name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part)) for name, part in params.items()
    }
    # t5-base as published. ViT-L/16 at 384 pixels: 304,715,752 with its classifier of 1,000 classes; the
    # class token's own position is part of the token here.
    assert counts["token_embedder"] + counts["encoder"] + counts["decoder"] == 222_903_552
    assert counts["vit"] == 304_715_752 - (1024 * 1000 + 1000) - 1024
    assert counts["image_projection"] == 1024 * 768 + 768


def letterboxed(network, rng):
    """Boxes [4, 4] of images padded at two sides, at one, or not at all; and images with other padding."""
    boxes = np.array([[4, 0, 12, 16], [0, 2, 16, 10], [0, 0, 16, 16], [0, 0, 7, 16]], np.int32)
    padding = np.ones((4, 16, 16), bool)
    for mask, (top, left, bottom, right) in zip(padding, boxes, strict=True):
        # Patches of 2 x 2: one that the box reaches into is part of the image.
        mask[top : bottom + bottom % 2, left:right] = False
    image = network.inputs["image"]
    other = np.where(padding[..., None], rng.integers(0, 256, image.shape, np.uint8), image)
    return boxes, other


def test_a_letterboxed_images_padding_changes_no_output(network, rng):
    boxes, other = letterboxed(network, rng)
    assert_close(labelled(network, image_box=boxes, image=other), labelled(network, image_box=boxes))
    # Without a box the padding is image.
    assert changed_slots(network(), network(image=other)) == all_slots([0, 1, 3], network.slots)


def test_a_box_around_everything_changes_nothing(network):
    everywhere = np.array([[0, 0, 16, 16]] * 4, np.int32)
    assert_close(labelled(network, image_box=everywhere), labelled(network))


def test_heads_see_zeros_where_a_letterboxed_image_is_padded(multi_head, rng):
    boxes, _ = letterboxed(multi_head, rng)

    def encode(boxes):
        return multi_head.module.apply(
            {"params": multi_head.params},
            multi_head.inputs["image"],
            multi_head.inputs["encoder_input_tokens"],
            boxes,
            method="encode",
        ).feature_maps(0, 1)

    zero = (np.asarray(jax.jit(encode)(boxes)) == 0).all(axis=-1)
    expected = np.zeros((4, 8, 8), bool)
    expected[0, :2], expected[0, 6:] = True, True
    expected[1, :, :1], expected[1, :, 5:] = True, True
    expected[3, 4:] = True
    np.testing.assert_array_equal(zero, expected)


def test_an_image_that_is_no_square(multi_head):
    image = multi_head.inputs["image"][:, :8]
    module = multi_head.module

    def heatmaps(params):
        encoded = module.apply(
            {"params": params}, image, multi_head.inputs["encoder_input_tokens"], method="encode"
        )
        return module.apply({"params": params}, encoded, feedback.Slots(2, 0, 0), method="heatmaps")

    # The small head doubles the map of 4 x 8 patches once.
    assert jax.eval_shape(heatmaps, multi_head.params).shape == (4, 2, 8, 16)


@pytest.mark.parametrize("sees_image", [True, False])
def test_what_the_text_decoder_attends_to(multi_head, sees_image):
    module = multi_head.module.clone(decoder_sees_image=sees_image)
    inputs = multi_head.inputs
    apply = functools.partial(module.apply, {"params": multi_head.params})

    @jax.jit
    def influence():
        encoded = apply(inputs["image"], inputs["encoder_input_tokens"], method="encode").last(1)

        def total(tokens):
            targets = [inputs[name][:, 0] for name in ("decoder_input_tokens", "decoder_target_tokens")]
            logits = apply(encoded.replace(tokens=tokens), *targets, method="decode")
            return jnp.sum(logits**2 * (targets[1] > 0)[..., None])

        return jnp.abs(jax.grad(total)(encoded.tokens)).sum(axis=(0, 1, 3))

    image_part, text_part = np.split(np.asarray(influence()), [64])
    assert (image_part > 0).all() == sees_image
    assert (image_part == 0).all() != sees_image
    # The last two of the six positions are padding.
    np.testing.assert_array_equal(text_part > 0, [True] * 4 + [False] * 2)


def test_a_class_token_reaches_every_output_and_no_map(make_model, make_batch, random_values):
    model = make_model("multi_head", "ViTConfig.class_token = True")
    params = random_values(initial_variables(model, 16)["params"])
    network = Network(model, params, make_batch(model, 2, 4, 1), SLOTS["multi_head"])
    before = network()
    assert before["heatmaps"].shape == (4, 2, 16, 16)
    other = {**params, "vit": {**params["vit"], "class_token": -params["vit"]["class_token"]}}
    assert changed_slots(before, network(other)) == all_slots(range(4), network.slots)


def test_bfloat16_is_near_float32(make_model, multi_head):
    bindings = [f"{config}.dtype = 'bfloat16'" for config in ("T5Config", "ViTConfig")]
    model = make_model("multi_head", *bindings)
    network = Network(model, multi_head.params, multi_head.inputs, multi_head.slots)
    rounded, exact = network(), multi_head()
    # bfloat16 keeps 8 bits, 0.4 % an operation; random weights, so errors of a dozen layers add up.
    for name, bound in {"heatmaps": 0.05, "scores": 0.05, "logits": 0.1}.items():
        assert rounded[name].dtype == np.float32
        scale = np.abs(exact[name]).max()
        assert 0 < np.abs(rounded[name] - exact[name]).max() < bound * scale, name


LOOPS = (("conv", 6, 3), ("conv", 6, 3), ("conv", 6, 3), ("deconv", 4, 3), ("conv", 4, 3), ("conv", 4, 3))


@pytest.mark.parametrize("strips", [1, 2])
def test_heads_in_loops_equal_those_one_after_the_other(
    make_model, make_batch, random_values, monkeypatch, strips
):
    """Loss and gradients, also in strips; XLA sees one convolution for a run of equal layers and heads."""
    monkeypatch.setattr(heads, "_MIN_ROWS", 8)
    layers = f"HeadsConfig.heatmap_layers = {LOOPS}"
    losses, grads, convolutions = [], [], []
    for scanned in (False, True):
        row_strips = f"HeadsConfig.row_strips = {strips if scanned else 1}"
        model = make_model("multi_head", layers, f"HeadsConfig.scan_layers = {scanned}", row_strips)
        batch = make_batch(model, 2, 4, 1)
        if not scanned:
            params = random_values(initial_variables(model, 16)["params"])

        def loss_fn(params, model=model, batch=batch):
            return model.loss_fn(params, batch, None)[0]

        loss, grad = jax.jit(jax.value_and_grad(loss_fn))(params)
        losses.append(loss)
        grads.append(traverse_util.flatten_dict(jax.device_get(grad)))
        convolutions.append(str(jax.make_jaxpr(loss_fn)(params)).count("conv_general_dilated["))
    np.testing.assert_allclose(*losses, rtol=1e-6)
    largest = max(np.abs(grad).max() for grad in grads[0].values())
    for name, expected in grads[0].items():
        # Sums in another order; some gradients, as of the keys' biases, are nothing but rounding.
        np.testing.assert_allclose(
            grads[1][name], expected, rtol=1e-4, atol=1e-6 * largest, err_msg="/".join(name)
        )
    assert convolutions[1] < convolutions[0] / 2


@pytest.mark.parametrize(("variant", "count"), [("multi_head", 4), ("augmented_prompt", 3)])
def test_scores_with_variances(make_model, random_values, rng, variant, count):
    """All ways to compute them agree: in a loop over the heads, one by one, one kind alone."""
    slots = feedback.Slots(0, count, 0)
    tokens = rng.standard_normal((2, slots.prompts(variant), 64 + 3, 16)).astype(np.float32)
    encoded = rahf.Encoded(tokens, np.ones(tokens.shape[:-1], bool), (8, 8), 0)
    found = []
    for scanned in (False, True):
        model = make_model(variant, "SCORE_UNCERTAINTY = True", f"HeadsConfig.scan_layers = {scanned}")
        if not scanned:
            params = {"params": random_values(initial_variables(model, 16)["params"])}
        scores = jax.jit(functools.partial(model.module.apply, slots=slots, method="scores"))
        found.append(model.module.named_scores(scores(params, encoded)))
    assert {name: value.shape for name, value in found[0].items()} == {
        "scores": (2, count),
        "score_log_variances": (2, count),
    }
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), *found)
    for i, kind in enumerate(feedback.SCORES[:count] if variant == feedback.MULTI_HEAD else ()):
        one = jax.jit(functools.partial(model.module.apply, kind=kind, method="score"))(params, encoded)
        np.testing.assert_allclose(one, found[0]["scores"][:, i], rtol=1e-5)


def test_the_variance_adds_one_layer_to_each_head(shipped, described):
    """What a checkpoint without it has keeps its name and shape."""
    without, with_variance = (
        described(shipped("rahf_tiny", "multi_head", f"SCORE_UNCERTAINTY = {on}")[1]) for on in (False, True)
    )
    assert without.items() <= with_variance.items()
    added = [
        f"score_head_{kind}/output_log_variance/{part}"
        for kind in feedback.SCORES
        for part in ("bias", "kernel")
    ]
    assert sorted(with_variance.keys() - without.keys()) == sorted(added)
