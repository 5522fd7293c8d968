"""RAHF's losses and predictions, on random parameters of the smallest size."""

import functools
import math

import jax
import numpy as np
import pytest

from richhf_jax import errors, feedback
from richhf_jax.costs import counter

# Few heads, because each is slow to compile.
SLOTS = {"multi_head": (1, 2, 1), "augmented_prompt": (2, 3, 2)}
LOSS_WEIGHTS = {"heatmap": 3.0, "score": 0.5, "keywords": 2.0}
LABEL_SMOOTHING, Z_LOSS = 0.1, 0.01
SCANNED = "SCAN_LAYERS = True"
BINDINGS = (
    *(f"models.RahfModel.{kind}_loss_weight = {weight}" for kind, weight in LOSS_WEIGHTS.items()),
    f"models.RahfModel.label_smoothing = {LABEL_SMOOTHING}",
    f"models.RahfModel.z_loss = {Z_LOSS}",
)


class Case:
    """A model, its parameters and a batch; its functions, each compiled once."""

    def __init__(self, model, params, batch):
        self.model, self.params, self.batch = model, params, batch
        self.compiled_forward = jax.jit(functools.partial(forward, model))
        self.compiled_gradients = jax.jit(jax.value_and_grad(model.loss_fn, has_aux=True), static_argnums=2)
        self.score = jax.jit(model.score_batch)
        self.predict = jax.jit(model.predict_batch_with_aux)

    def gradients(self, **changed):
        """Returns loss, metrics and gradients of a changed batch, with the unchanged batch's weights."""
        normalizers = self.model.loss_weights(self.batch)
        (loss, metrics), found = self.compiled_gradients(self.params, self.batch | changed, None, normalizers)
        return float(loss), metrics, jax.tree.map(np.asarray, found)

    @functools.cached_property
    def outputs(self):
        return self.compiled_forward(self.params, self.batch)

    @functools.cached_property
    def predictions(self):
        return self.predict(self.params, self.batch)


@pytest.fixture(scope="module")
def make(make_model, make_batch, random_values):
    """Makes a `Case`."""

    @functools.cache
    def parameters(variant, *bindings):
        model = make_model(variant, *bindings)
        params = random_values(initial_shapes(model, make_batch(model, *SLOTS[variant]))["params"])
        # No prediction is padding: a trained model never says it.
        params["decoder"]["logits_dense"]["kernel"][:, 0] = 0
        return params

    @functools.cache
    def make(variant, *bindings, slots=None):
        params = parameters(variant, *(binding for binding in bindings if binding == SCANNED))
        # The last to configure gin: decoding functions ask it when they are called.
        model = make_model(variant, *BINDINGS, *bindings)
        return Case(model, params, make_batch(model, *(slots or SLOTS[variant])))

    return make


@pytest.fixture(params=feedback.VARIANTS)
def case(request, make):
    return make(request.param)


@pytest.fixture
def multi_head(make):
    return make("multi_head")


def initial_shapes(model, batch):
    shapes = {name: value.shape for name, value in batch.items()}
    return jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), shapes))


def forward(model, params, batch):
    inputs = ("image", "encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    return model.module.apply(
        {"params": params},
        *(batch[name] for name in inputs),
        num_heatmaps=batch["heatmap_weights"].shape[1],
        num_scores=batch["score_weights"].shape[1],
        enable_dropout=False,
    )


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def numpy_losses(outputs, batch):
    """Computes each loss as a sum and its divisor."""
    heat = batch["heatmap_targets"] / 255
    error = ((np.asarray(outputs["heatmaps"]) - heat) ** 2).mean(axis=(2, 3))
    heatmap = (batch["heatmap_weights"] * error).sum(), batch["heatmap_weights"].sum()
    error = (np.asarray(outputs["scores"]) - batch["score_targets"]) ** 2
    score = (batch["score_weights"] * error).sum(), batch["score_weights"].sum()
    vocab, log_probs = 32, log_softmax(outputs["logits"])
    is_target = np.eye(vocab)[batch["decoder_target_tokens"]] == 1
    distribution = np.where(is_target, 1 - LABEL_SMOOTHING, LABEL_SMOOTHING / (vocab - 1))
    # The smoothed targets' entropy is what no prediction can undercut.
    divergence = (distribution * (np.log(distribution) - log_probs)).sum(axis=-1)
    log_z = np.log(np.exp(np.asarray(outputs["logits"], np.float64)).sum(axis=-1))
    tokens = (divergence + Z_LOSS * log_z**2) * batch["decoder_loss_weights"]
    return {
        "heatmap": heatmap,
        "score": score,
        "keywords": (tokens.sum(), batch["decoder_loss_weights"].sum()),
    }


def test_the_loss_by_numpy(case):
    batch, outputs = case.batch, case.outputs
    loss, metrics = jax.jit(case.model.eval_fn)(case.params, batch)
    expected = numpy_losses(outputs, batch)
    assert 0 < expected["score"][1] < batch["score_weights"].size, "some labels are missing"
    total = sum(LOSS_WEIGHTS[kind] * value / count for kind, (value, count) in expected.items())
    np.testing.assert_allclose(loss, total, rtol=1e-4)
    np.testing.assert_allclose(metrics.pop("loss").compute(), total, rtol=1e-4)
    accuracy = metrics.pop("keywords/token_accuracy")
    right = outputs["logits"].argmax(axis=-1) == batch["decoder_target_tokens"]
    hits = right * batch["decoder_loss_weights"]
    np.testing.assert_allclose((accuracy.total, accuracy.weight), (hits.sum(), expected["keywords"][1]))
    assert metrics.keys() == {f"loss/{kind}" for kind in expected}
    for kind, pair in expected.items():
        found = metrics[f"loss/{kind}"]
        np.testing.assert_allclose((found.total, found.weight), pair, rtol=1e-4, err_msg=kind)


def test_parts_of_a_batch_add_up_by_the_whole_batchs_weights(multi_head):
    names = ("heatmap_weights", "score_weights", "decoder_loss_weights")
    first = np.arange(4) == 0

    def only(rows):
        weights = {name: multi_head.batch[name].copy() for name in names}
        for value in weights.values():
            value[~rows] = 0
        return multi_head.gradients(**weights)

    whole, _, expected = multi_head.gradients()
    (part, _, gradients), (rest, _, other_gradients) = only(first), only(~first)
    np.testing.assert_allclose(part + rest, whole, rtol=1e-5)
    total = jax.tree.map(np.add, gradients, other_gradients)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), total, expected)


def test_labels_without_weight_change_neither_loss_nor_gradients(multi_head):
    batch = multi_head.batch
    loss, _, expected = multi_head.gradients()
    no_heatmap = batch["heatmap_weights"][..., None, None] == 0
    other_loss, _, other = multi_head.gradients(
        heatmap_targets=np.where(no_heatmap, np.uint8(77), batch["heatmap_targets"]),
        score_targets=np.where(batch["score_weights"] == 0, np.float32(9), batch["score_targets"]),
    )
    assert other_loss == loss
    jax.tree.map(np.testing.assert_array_equal, other, expected)

    weights = ("heatmap_weights", "score_weights", "decoder_loss_weights")
    nothing = {name: np.zeros_like(batch[name]) for name in weights}
    loss, metrics, found = multi_head.gradients(**nothing)
    assert loss == 0
    # Such a part takes no share in a mean over parts.
    assert metrics["loss/score"].weight == metrics["loss/heatmap"].weight == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(found))
    # Not divided by 0, which would be NaN.
    assert all(value == 1 for value in multi_head.model.loss_weights(batch | nothing).values())


def test_a_batch_of_captions_trains_the_same_parameters(make):
    captions = make("multi_head", slots=(0, 0, 1))
    loss, metrics, gradients = captions.gradients()
    assert metrics.keys() == {"loss", "loss/keywords", "keywords/token_accuracy"}
    np.testing.assert_allclose(loss, LOSS_WEIGHTS["keywords"] * metrics["loss/keywords"].compute(), rtol=1e-6)
    for name, part in gradients.items():
        resting = "_head_" in name
        assert all((leaf == 0).all() == resting for leaf in jax.tree.leaves(part)), name


@pytest.mark.parametrize("variant", feedback.VARIANTS)
def test_every_batch_initialises_the_same_parameters(make, variant):
    full, captions = make(variant), make(variant, slots=(0, 0, 1))
    full, captions = (initial_shapes(case.model, case.batch)["params"] for case in (full, captions))
    assert full == captions
    assert any("score_head" in name for name in captions)


def test_another_image_size_is_refused_unless_resampling_is_asked_for(make_model, make_batch):
    """small.gin's ViT is for 16 x 16 pixels, in patches of 2."""

    def shapes(height, width, *bindings):
        model = make_model("multi_head", *bindings)
        batch = make_batch(model, 2, 4, 1)
        return initial_shapes(model, batch | {"image": np.zeros((4, height, width, 3), np.uint8)})["params"]

    asked = "RESAMPLE_POSITIONS = True"
    refusal = (
        r"IMAGE_SIDE: images have {} pixels.* for 16x16: .*grid of 8x8 patches, each of 2 pixels"
        ".*--gin.IMAGE_SIDE=16.*--gin.RESAMPLE_POSITIONS=True"
    )
    for size in ((8, 8), (16, 8), (8, 16), (15, 15)):
        with pytest.raises(errors.UserError, match=refusal.format("{}x{}".format(*size))):
            shapes(*size)
    positions = [shapes(16, 16)["vit"], shapes(8, 8, asked)["vit"]]
    assert positions[0] == positions[1]
    with pytest.raises(errors.UserError, match="have 16x15 pixels.* patches of 2 "):
        shapes(16, 15, asked)


def test_dropout_only_with_a_seed(make):
    case = make("multi_head", "DROPOUT_RATE = 0.5", slots=(0, 0, 1))
    loss_fn = jax.jit(lambda rng: case.model.loss_fn(case.params, case.batch, rng)[0])
    losses = [float(loss_fn(jax.random.key(seed))) for seed in (1, 1, 2)]
    assert losses[0] == losses[1]
    assert abs(losses[0] - losses[2]) > 1e-3
    assert "random" in str(jax.make_jaxpr(loss_fn)(jax.random.key(1)))
    assert "random" not in str(jax.make_jaxpr(case.model.eval_fn)(case.params, case.batch))


def as_targets(batch, tokens):
    """Returns the batch with these texts, int [batch, texts, length], as targets."""
    return batch | {
        "decoder_input_tokens": np.pad(tokens[..., :-1], ((0, 0), (0, 0), (1, 0))),
        "decoder_target_tokens": tokens,
        "decoder_loss_weights": (tokens > 0).astype(np.float32),
    }


def test_predictions_are_the_networks_outputs(case):
    predictions, aux = case.predictions
    assert predictions.keys() == {"heatmaps", "scores", "tokens"}
    for name in ("heatmaps", "scores"):
        assert predictions[name].dtype == np.float32
        np.testing.assert_allclose(predictions[name], case.outputs[name], rtol=1e-4, atol=1e-6)
    assert predictions["tokens"].shape == case.batch["decoder_target_tokens"].shape
    assert predictions["tokens"].dtype == np.int32
    assert aux["scores"].shape == (*case.batch["decoder_target_tokens"].shape[:2], 1)
    np.testing.assert_array_equal(aux["decodes"], predictions["tokens"][:, :, None])


def test_decoding_with_the_cache_agrees_with_teacher_forcing(case):
    predictions, aux = case.predictions
    tokens = np.asarray(predictions["tokens"])
    assert len(np.unique(tokens)) > 4, "the texts are not all the same"
    forced = as_targets(case.batch, tokens)
    logits = case.compiled_forward(case.params, forced)["logits"]
    np.testing.assert_array_equal(np.where(tokens > 0, logits.argmax(axis=-1), 0), tokens)
    likelihood = case.score(case.params, forced)
    np.testing.assert_allclose(aux["scores"][..., 0], likelihood, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scanned", [(), (SCANNED,)])
def test_a_word_more_costs_no_keys_of_the_prompt(make, scanned):
    case = make("multi_head", *scanned)
    config = case.model.module.t5_config

    def flops(words):
        texts = {name: case.batch[name][..., :words] for name in case.batch if name.startswith("decoder")}
        lowered = jax.jit(case.model.predict_batch).lower(case.params, case.batch | texts)
        return counter.analyze(lowered.as_text(dialect="hlo")).flops

    rows = len(case.batch["image"]) * case.batch["decoder_input_tokens"].shape[1]
    tokens = math.prod(case.model.module.vit_config.grid) + case.batch["encoder_input_tokens"].shape[-1]
    keys = 2 * rows * tokens * config.emb_dim * config.num_heads * config.head_dim
    assert flops(5) - flops(4) < keys  # With all layers' keys and values, it was several times as much.


@pytest.mark.parametrize(
    ("decode_fn", "scanned"), [("beam_search", ()), ("beam_search", (SCANNED,)), ("temperature_sample", ())]
)
def test_every_one_of_several_texts_has_its_own_cache(make, decode_fn, scanned):
    settings = "beam_search.alpha = 0.0" if decode_fn == "beam_search" else "temperature_sample.topk = 0"
    case = make(
        "multi_head",
        f"DECODE_FN = @decoding.{decode_fn}",
        "NUM_DECODES = 3",
        f"decoding.{settings}",
        *scanned,
    )
    predictions, aux = case.predictions
    decodes = np.asarray(aux["decodes"])
    np.testing.assert_array_equal(predictions["tokens"], decodes[:, :, -1])
    texts = [as_targets(case.batch, decodes[:, :, i]) for i in range(3)]
    likelihood = np.stack([case.score(case.params, batch) for batch in texts], axis=-1)
    # Those without padding in them: a draw may be padding, which teacher forcing hides from later positions.
    written = decodes > 0
    ended = (decodes == 1).any(axis=-1) & (np.diff(written.astype(int), axis=-1) <= 0).all(axis=-1)
    whole = ended | written.all(axis=-1)
    assert whole.sum() >= 3
    np.testing.assert_allclose(aux["scores"][whole], likelihood[whole], rtol=1e-4, atol=1e-4)
    assert (np.diff(aux["scores"], axis=-1) >= 0).all()


def keyword_features(rng, case):
    """Makes two words of one or two pieces for each text, and a suffix of one: with EOS at most 7 pieces."""
    shape = case.batch["decoder_target_tokens"].shape
    pieces, words = np.zeros((2, *shape), np.int32)
    for index in np.ndindex(*shape[:2]):
        sizes = rng.integers(1, 3, 2)
        pieces[index][: sizes.sum()] = rng.integers(4, 32, sizes.sum())
        words[index][: sizes.sum()] = np.repeat([1, 2], sizes)
    suffix = np.full((shape[0], 1), 3, np.int32)
    return {"keyword_pieces": pieces, "keyword_words": words, "keyword_suffix": suffix}


@pytest.mark.parametrize(("variant", "threshold"), [("multi_head", 0.5), ("augmented_prompt", 0.8)])
def test_constrained_keywords_agree_with_teacher_forcing(make, rng, variant, threshold):
    case = make(variant, f"MISALIGNMENT_THRESHOLD = {threshold}")
    features = keyword_features(rng, case)
    predictions, aux = case.predict(case.params, case.batch | features)
    tokens = np.asarray(predictions["tokens"])
    forced = as_targets(case.batch, tokens)
    logits = np.asarray(case.compiled_forward(case.params, forced)["logits"])
    decisions = []
    for index in np.ndindex(*tokens.shape[:2]):
        probability, misaligned = (
            predictions[f"keyword_{name}"][index] for name in ("probability", "misaligned")
        )
        step = 0
        for number in (1, 2):
            size = (features["keyword_words"][index] == number).sum()
            at = np.argmax(features["keyword_words"][index] == number)
            step += size
            if step >= tokens.shape[-1]:  # The decoder's length ended before.
                assert np.isnan(probability[number - 1])
                continue
            np.testing.assert_array_equal(
                tokens[index][step - size : step], features["keyword_pieces"][index][at : at + size]
            )
            following = np.append(features["keyword_pieces"][index], 0)[at + size] or 1  # Or the end.
            odds = logits[index][step, 3] - logits[index][step, following]
            np.testing.assert_allclose(probability[number - 1], 1 / (1 + np.exp(-odds)), rtol=1e-4, atol=1e-5)
            decisions.append((odds, misaligned[number - 1]))
            if misaligned[number - 1]:
                assert tokens[index][step] == 3
                step += 1
        assert np.isnan(probability[2:]).all()
        assert not misaligned[2:].any()
    log_odds, marked = map(np.array, zip(*decisions, strict=True))
    probabilities = 1 / (1 + np.exp(-log_odds))
    np.testing.assert_array_equal(marked, probabilities > threshold)
    assert 0 < marked.sum() < len(marked)
    assert threshold == 0.5 or (marked != (probabilities > 0.5)).any()
    np.testing.assert_array_equal(aux["decodes"][:, :, 0], tokens)
    likelihood = case.score(case.params, forced)
    np.testing.assert_allclose(aux["scores"][..., 0], likelihood, rtol=1e-4, atol=1e-5)


def test_the_targets_are_not_looked_at(case):
    hidden = {name: np.zeros_like(value) for name, value in case.batch.items() if name.startswith("decoder_")}
    again = case.predict(case.params, case.batch | hidden)
    jax.tree.map(np.testing.assert_array_equal, again, case.predictions)


def test_score_batch_is_the_targets_log_likelihood(case):
    found = case.score(case.params, case.batch)
    target, weights = case.batch["decoder_target_tokens"], case.batch["decoder_loss_weights"]
    chosen = np.take_along_axis(log_softmax(case.outputs["logits"]), target[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(found, (chosen * weights).sum(axis=-1), rtol=1e-4)


def test_only_what_has_slots_is_predicted(make):
    case = make("augmented_prompt", slots=(0, 1, 0))
    predictions, aux = jax.eval_shape(case.model.predict_batch_with_aux, case.params, case.batch)
    assert predictions.keys() == {"scores"}
    assert aux == {}


def test_summary_images_show_heatmaps_and_need_nothing_else(case):
    asked = []

    def predict(change):
        asked.append(jax.eval_shape(case.model.predict_batch, case.params, change(case.batch)).keys())
        return case.predictions[0]

    (picture,) = case.model.summary_images(case.batch, predict).values()
    assert asked == [{"heatmaps"}]
    image, truth, predicted = np.split(picture, 3, axis=2)
    np.testing.assert_array_equal(image, case.batch["image"])
    np.testing.assert_array_equal(truth[..., 2], case.batch["heatmap_targets"][:, 0])
    np.testing.assert_allclose(predicted[..., 1], 255 * case.predictions[0]["heatmaps"][:, 0], atol=1)


UNCERTAIN = "SCORE_UNCERTAINTY = True"


@pytest.fixture(scope="module")
def uncertain(make_model, make_batch, random_values):
    model = make_model("multi_head", *BINDINGS, UNCERTAIN)
    batch = make_batch(model, 0, 2, 0)
    return Case(model, random_values(initial_shapes(model, batch)["params"]), batch)


def test_the_loss_of_uncertain_scores_by_numpy(uncertain):
    batch = uncertain.batch
    assert uncertain.model.has_uncertainty
    loss, metrics, grads = uncertain.gradients()
    outputs = uncertain.outputs
    error = (np.asarray(outputs["scores"], np.float64) - batch["score_targets"]) ** 2
    variance = np.exp(np.asarray(outputs["score_log_variances"], np.float64))
    nll = (error / variance + np.log(2 * np.pi * variance)) / 2
    weights, count = batch["score_weights"], batch["score_weights"].sum()
    expected = (weights * 2 * 0.2 * np.sqrt(variance) * nll).sum() / count
    np.testing.assert_allclose(loss, LOSS_WEIGHTS["score"] * expected, rtol=1e-4)
    # The metric of the old name stays the squared error.
    for name, values in {"loss/score": error, "loss/score_nll": nll}.items():
        found = metrics[name]
        np.testing.assert_allclose((found.total, found.weight), ((weights * values).sum(), count), rtol=1e-4)
    # A score without a label trains neither number.
    no_label = batch["score_weights"] == 0
    assert no_label.any()
    other_loss, _, other = uncertain.gradients(
        score_targets=np.where(no_label, np.float32(9), batch["score_targets"])
    )
    assert other_loss == loss
    jax.tree.map(np.testing.assert_array_equal, other, grads)


def test_predictions_have_standard_deviations(uncertain):
    predictions, _ = uncertain.predictions
    assert predictions.keys() == {"scores", "score_deviations"}
    expected = np.exp(np.asarray(uncertain.outputs["score_log_variances"]) / 2)
    np.testing.assert_allclose(predictions["score_deviations"], expected, rtol=1e-4)
