"""The benchmark's PyTorch model equals our model: same parameters, same outputs."""

import re

import jax
import numpy as np
import pytest
import torch
from flax import traverse_util

from richhf_jax import errors, feedback
from torch_twin import network

# Also what the paper's size has and small.gin hasn't: a 3x3 convolution in the head, and a deconv at its end;
# and the stem of the tiny one.
BINDINGS = (
    "rahf.HeadsConfig.heatmap_layers = (('conv', 5, 3), ('deconv', 6, 3), ('conv', 4, 2))",
    "rahf.HeadsConfig.heatmap_output_layer = ('deconv', 3)",
    "vit.ViTConfig.patch_size = 4",
    "vit.ViTConfig.grid = (4, 4)",
    "vit.ViTConfig.stem_filters = (10,)",
)
SLOTS = {"multi_head": feedback.Slots(2, 4, 1), "augmented_prompt": feedback.Slots(1, 2, 1)}
# What float32 rounding leaves: the sums of a layer are added up in another order.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


def torch_name(path: tuple[str, ...]) -> str:
    """Translates our name of a parameter to the twin's."""
    name = ".".join(path)
    name = re.sub(r"^(heatmap_head|score_head)(_\w+)?\.", lambda m: f"{m[1]}.{(m[2] or '_all')[1:]}.", name)
    name = re.sub(r"\.(conv|deconv)_(\d+)\.", r".blocks.\2.conv.", name)
    name = re.sub(r"\.norm_(\d+)\.", r".blocks.\1.norm.", name)
    name = re.sub(r"\b(layers|dense|wi)_(\d+)\.", r"\1.\2.", name).replace(".wi.kernel", ".wi.0.kernel")
    name = re.sub(r"stem_(\d+)\.kernel", r"stem.\1.conv.kernel", name)
    name = re.sub(r"stem_(\d+)\.", r"stem.\1.", name).replace(".wi.bias", ".wi.0.bias")
    name = name.replace("position_embedding.embedding", "position_embedding")
    return re.sub(r"\.(kernel|scale|embedding)$", ".weight", name)


def torch_value(path: tuple[str, ...], value: np.ndarray) -> torch.Tensor:
    """Transposes a parameter from our layout to PyTorch's."""
    if path[-1] == "kernel" and value.ndim == 2:
        value = value.T
    elif path[-1] == "kernel":
        kind = "deconv" if path[-2].startswith("deconv") or path[-2] == "output" else "conv"
        # [height, width, in, out] -> [out, in, height, width]; transposed: [in, out, height, width], mirrored
        value = value.transpose(3, 2, 0, 1) if kind == "conv" else value[::-1, ::-1].transpose(2, 3, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(value))


@pytest.fixture(scope="module", params=list(SLOTS))
def both(request, make_model, make_batch, random_values):
    """Makes our model with parameters, the twin with the same ones, a batch, and the slots."""
    variant = request.param
    model = make_model(
        variant,
        *BINDINGS,
        *(f"models.RahfModel.{kind}_loss_weight = 1" for kind in ("heatmap", "score", "keywords")),
        "models.RahfModel.eos_id = -1",  # Texts of full length: the twin doesn't stop before.
    )
    slots = SLOTS[variant]
    batch = make_batch(model, *slots)
    batch |= {name: np.ones_like(batch[name]) for name in ("heatmap_weights", "score_weights")}
    shapes = {name: value.shape for name, value in batch.items()}
    params = random_values(
        jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), shapes))["params"]
    )
    twin = network.Rahf(model.module, prompt_length=6, target_length=5)
    flat = traverse_util.flatten_dict(params)
    state = {torch_name(path): torch_value(path, value) for path, value in flat.items()}
    twin.load_state_dict(state)  # Strict: the names are all of them, and every shape fits.
    return model, params, twin, batch, slots


def as_torch(batch):
    return {name: torch.from_numpy(value) for name, value in batch.items()}


def test_outputs_and_loss(both, monkeypatch):
    model, params, twin, batch, slots = both

    @jax.jit
    def ours(params):
        outputs = model._outputs(params, batch, None)
        monkeypatch.setattr(model, "_outputs", lambda *_: outputs)  # Compiled once.
        return outputs, model.eval_fn(params, batch)[0]

    outputs, expected_loss = ours(params)
    with torch.no_grad():
        heatmaps, scores, logits = twin(as_torch(batch), slots)
        loss = twin.loss(as_torch(batch), slots)
    # Ours hides padding from itself, too: what stands there means nothing.
    written = batch["decoder_target_tokens"] > 0
    pairs = (
        (heatmaps, outputs["heatmaps"]),
        (scores, outputs["scores"]),
        (logits.unflatten(0, written.shape[:2])[written], outputs["logits"][written]),
    )
    for twins, expected in pairs:
        np.testing.assert_allclose(twins, expected, **TOLERANCE)
        # The outputs differ from each other by far more than the tolerance.
        assert np.std(expected) > 100 * TOLERANCE["atol"]
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)


def test_greedy_decoding(both):
    model, params, twin, batch, slots = both
    # Without the other outputs it compiles faster.
    none = np.zeros((4, 0), np.float32)
    texts_alone = batch | {"heatmap_weights": none, "score_weights": none}
    expected = jax.jit(model.predict_batch)(params, texts_alone)["tokens"]
    tensors = as_torch(batch)
    decoder = network.GreedyDecoder(twin, model.module.t5_config, 4 * slots.texts, torch.float32)
    with torch.no_grad():
        encoded, valid = twin.encode(tensors["image"], tensors["encoder_input_tokens"])
        for _ in range(2):  # The second time shows that the first left nothing behind.
            decoder.start(encoded[:, -slots.texts :].flatten(0, 1), valid[:, -slots.texts :].flatten(0, 1))
            for _ in range(5):
                decoder.step()
    np.testing.assert_array_equal(decoder.tokens[:, 1:].unflatten(0, (4, slots.texts)), expected)
    assert len(np.unique(expected)) > 2


@pytest.mark.parametrize(
    ("binding", "what"),
    [
        ("t5.T5Config.logits_via_embedding = True", "logits by the token table"),
        ("SCORE_UNCERTAINTY = True", "variances of scores"),
    ],
)
def test_what_it_cannot_build_is_named(make_model, binding, what):
    module = make_model("multi_head", binding).module
    with pytest.raises(errors.UserError, match=f"no {what}: leave out --torch"):
        network.Rahf(module, 6, 5)
