"""Training steps are the same with any microbatches and on any mesh.

Most tests train `Affine`, which compiles quickly; two train RAHF.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from flax.linen.partitioning import AxisMetadata
from jax.sharding import Mesh, PartitionSpec

from richhf_jax import errors, losses, models, optimizers, partitioning
from richhf_jax import trainer as trainer_lib

NAMES = [("dense", "bias"), ("dense", "kernel")]


class Affine(models.BaseModel):
    """points @ kernel + bias, with a weighted squared error; a metric shows the number drawn by the seed."""

    def get_initial_variables(self, rng, input_shapes, input_types=None):
        kernel = jax.random.normal(rng, (input_shapes["points"][1], 4))
        axes = {"kernel_axes": AxisMetadata(("embed", "mlp")), "bias_axes": AxisMetadata(("mlp",))}
        return {"params": {"dense": {"kernel": kernel, "bias": jnp.ones(4)}}, "params_axes": {"dense": axes}}

    def loss_weights(self, batch):
        return {"loss": jnp.sum(batch["weights"])}

    def loss_fn(self, params, batch, dropout_rng, normalizers=None):
        weights = batch["weights"]
        total = losses.weighted_squared_error(
            self.predict_batch(params, batch)["y"][:, None], batch["targets"][:, None], weights
        )
        normalizers = normalizers or self.loss_weights(batch)
        loss = total / normalizers["loss"]
        metrics = {"error": losses.WeightedMean(total, jnp.sum(weights))}
        metrics["loss"] = losses.WeightedMean(loss, jnp.ones(()))
        if dropout_rng is not None:
            metrics["drawn"] = losses.WeightedMean(jax.random.uniform(dropout_rng), jnp.ones(()))
        return loss, metrics

    def predict_batch_with_aux(self, params, batch, rng=None):
        dense = params["dense"]
        return {"y": batch["points"] @ dense["kernel"] + dense["bias"][None]}, {}

    def score_batch(self, params, batch):
        raise AssertionError("training scores nothing")


@pytest.fixture
def batch(rng):
    """Makes eight examples; the even ones, the first of two microbatches, have almost no weight."""
    points, targets = rng.normal(size=(8, 3)), rng.normal(size=(8, 4))
    weights = np.array([[0, 5, 0, 1, 0, 2, 0.5, 1]]).T
    values = {"points": points, "targets": targets, "weights": weights}
    return {name: value.astype(np.float32) for name, value in values.items()}


def make_trainer(model, batch, devices=2, num_partitions=1, **kwargs):
    partitioner = partitioning.PjitPartitioner(num_partitions=num_partitions)
    if devices == 1:
        mesh = partitioner.mesh
        partitioner.mesh = Mesh(mesh.devices[:1], mesh.axis_names, axis_types=mesh.axis_types)
    shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in batch.items()}
    return trainer_lib.Trainer(model, partitioner, shapes, **kwargs)


LAYOUTS = [
    {},
    {"devices": 1},
    {"num_partitions": 2},
    {"num_microbatches": 2},
    {"num_microbatches": 4},
    {"num_microbatches": 4, "num_partitions": 2},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_step_by_numpy_whatever_the_layout(batch, layout):
    trainer = make_trainer(Affine(optax.sgd(0.1)), batch, **layout)
    state = trainer.init_state()
    kernel, bias = (np.asarray(state.params["dense"][name], np.float64) for name in ("kernel", "bias"))
    state, metrics = trainer.train_step(state, batch)

    error = batch["points"] @ kernel + bias - batch["targets"]
    share = batch["weights"] / batch["weights"].sum()
    # The mean is over four outputs.
    bias_gradient = (2 * share * error / 4).sum(axis=0)
    kernel_gradient = batch["points"].T @ (2 * share * error / 4)
    np.testing.assert_allclose(state.params["dense"]["kernel"], kernel - 0.1 * kernel_gradient, rtol=1e-4)
    np.testing.assert_allclose(state.params["dense"]["bias"], bias - 0.1 * bias_gradient, rtol=1e-4)
    found = trainer_lib.summarize([metrics])
    loss = (share * error**2).sum() / 4
    norm = np.sqrt((kernel_gradient**2).sum() + (bias_gradient**2).sum())
    for name, expected in (("loss", loss), ("error", loss), ("gradient_norm", norm)):
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, err_msg=name)


def test_a_network_that_refuses_its_settings_is_the_users_mistake_and_other_errors_are_not(
    batch, make_model, make_batch, monkeypatch
):
    data = make_batch(make_model("multi_head"), 2, 4, 1)
    with pytest.raises(
        errors.UserError, match="VARIANT is 'augmented_prompt', which takes 7 prompts .* have 1"
    ):
        make_trainer(make_model("augmented_prompt"), data)
    with pytest.raises(
        errors.UserError, match="settings don't fit each other .* 5 heads do not divide the width"
    ):
        make_trainer(make_model("multi_head", "vit.ViTConfig.num_heads = 5"), data)

    def fail(*args):
        raise ValueError("a bug")

    monkeypatch.setattr(Affine, "get_initial_variables", fail)
    with pytest.raises(ValueError, match="a bug"):
        make_trainer(Affine(optax.sgd(0.1)), batch)


def test_microbatches_must_divide_the_batch(batch):
    with pytest.raises(ValueError, match="batch size 8 doesn't split into 3 microbatches"):
        make_trainer(Affine(optax.sgd(0.1)), batch, num_microbatches=3)


@pytest.mark.parametrize("use_hardware_rng", [False, True])
def test_every_step_and_microbatch_draws_its_own_dropout(batch, use_hardware_rng):
    def draws(steps, **kwargs):
        trainer = make_trainer(Affine(optax.sgd(0.1)), batch, use_hardware_rng=use_hardware_rng, **kwargs)
        state, found = trainer.init_state(), []
        for _ in range(steps):
            state, metrics = trainer.train_step(state, batch)
            found.append(float(metrics["drawn"].total))
        return found

    whole = draws(6)
    assert len(set(whole)) == 6
    assert draws(6) == whole, "the same seed, the same draws"
    assert not set(draws(6, random_seed=1)) & set(whole)
    # Two microbatches draw what two steps do; the metric adds them up.
    np.testing.assert_allclose(
        draws(3, num_microbatches=2), np.sum(np.reshape(whole, (3, 2)), axis=1), rtol=1e-6
    )


@pytest.mark.parametrize(("use_hardware_rng", "impl"), [(False, "threefry2x32"), (True, "unsafe_rbg")])
def test_initial_parameters_follow_from_seed_and_generator(batch, use_hardware_rng, impl):
    model = Affine(optax.sgd(0.1))
    trainer = make_trainer(model, batch, random_seed=3, use_hardware_rng=use_hardware_rng, devices=1)
    init_rng, _ = jax.random.split(jax.random.key(3, impl=impl))
    shapes = {name: value.shape for name, value in batch.items()}
    expected = jax.jit(lambda: model.get_initial_variables(init_rng, shapes)["params"])()
    found = trainer.init_state().params
    np.testing.assert_array_equal(found["dense"]["kernel"], expected["dense"]["kernel"])


def test_the_old_state_is_given_away(batch):
    trainer = make_trainer(Affine(optimizers.adamw(lambda step: 0.1)), batch)
    old = trainer.init_state()
    new, _ = trainer.train_step(old, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def test_evaluation_weighs_batches_by_their_labels(batch):
    trainer = make_trainer(Affine(optax.sgd(0.1)), batch)
    state = trainer.init_state()
    other = batch | {"weights": np.ones_like(batch["weights"])}
    one, two, both = (trainer.evaluate(state, batches) for batches in ([batch], [other], [batch, other]))
    weights = batch["weights"].sum(), other["weights"].sum()
    np.testing.assert_allclose(
        both["error"], np.average([one["error"], two["error"]], weights=weights), rtol=1e-5
    )
    assert "drawn" not in both, "evaluation drops nothing out"


def test_predictions(batch):
    trainer = make_trainer(Affine(optax.sgd(0.1)), batch)
    state = trainer.init_state()
    expected = batch["points"] @ np.asarray(state.params["dense"]["kernel"]) + 1
    np.testing.assert_allclose(trainer.predict(state, batch)["y"], expected, rtol=1e-5, atol=1e-6)


def test_parameters_and_moments_are_laid_out_as_the_rules_say(batch):
    trainer = make_trainer(Affine(optimizers.adamw(lambda step: 0.1)), batch, num_partitions=2)
    state, _ = trainer.train_step(trainer.init_state(), batch)
    for tree in (state.params, *(optax.tree.get(state.opt_state, name) for name in ("mu", "nu"))):
        kernel = tree["dense"]["kernel"]
        assert kernel.sharding.spec == PartitionSpec(None, "model")
        assert kernel.addressable_shards[0].data.shape == (3, 2)
    assert state.step.sharding.is_fully_replicated
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), state) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), trainer.abstract_state
    )


@pytest.mark.parametrize("given", [[], NAMES[:1], NAMES], ids=len)
def test_given_parameters_are_kept_and_the_others_are_fresh(batch, given):
    trainer = make_trainer(Affine(optimizers.adamw(lambda step: 0.1)), batch)
    fresh = traverse_util.flatten_dict(trainer.init_state().params)
    state = trainer.init_state({name: jnp.full_like(fresh[name], 7) for name in given})
    assert int(state.step) == 0
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(state.opt_state))
    for name, value in traverse_util.flatten_dict(state.params).items():
        np.testing.assert_array_equal(value, 7 if name in given else fresh[name])


def test_summaries_merge_sums_and_leave_out_what_nothing_weighed():
    def mean(total, weight):
        return losses.WeightedMean(jnp.asarray(total), jnp.asarray(weight))

    steps = [
        {"loss": mean(3.0, 1.0), "score": mean(1.0, 2.0), "none": mean(0.0, 0.0), "rare": mean(0.0, 0.0)},
        {"loss": mean(5.0, 1.0), "score": mean(9.0, 8.0), "none": mean(0.0, 0.0), "rare": mean(6.0, 2.0)},
    ]
    assert trainer_lib.summarize(steps) == {"loss": 4.0, "score": 1.0, "rare": 3.0}


def test_logical_axes_of_parameters():
    axes = {"a": {"kernel_axes": AxisMetadata(("embed", "mlp")), "bias_axes": AxisMetadata((None,))}}
    expected = {"a": {"kernel": PartitionSpec("embed", "mlp"), "bias": PartitionSpec(None)}}
    assert trainer_lib.axes_by_param(axes) == expected


class Centred(Affine):
    """Subtracts a running mean of the points, its batch statistics: the mean moves halfway at each batch."""

    def get_initial_variables(self, rng, input_shapes, input_types=None):
        variables = super().get_initial_variables(rng, input_shapes)
        return variables | {"batch_stats": {"norm": {"mean": jnp.zeros(input_shapes["points"][1])}}}

    def loss_fn(self, params, batch, dropout_rng, normalizers=None, *, flax_mutables):
        mean = flax_mutables["batch_stats"]["norm"]["mean"]
        centred = dict(batch) | {"points": batch["points"] - mean[None]}
        loss, metrics = super().loss_fn(params, centred, dropout_rng, normalizers)
        mean = (mean + batch["points"].mean(axis=0)) / 2
        return loss, (metrics, {"batch_stats": {"norm": {"mean": mean}}})

    def predict_batch_with_aux(self, params, batch, rng=None, flax_mutables=None):
        # Within the loss, the points are centred already.
        mean = flax_mutables["batch_stats"]["norm"]["mean"][None] if flax_mutables else 0.0
        centred = dict(batch) | {"points": batch["points"] - mean}
        return super().predict_batch_with_aux(params, centred, rng)


def mean_of(state):
    return np.asarray(state.flax_mutables["batch_stats"]["norm"]["mean"])


@pytest.mark.parametrize("count", [None, 2])
def test_mutable_collections_change_with_each_part_of_a_batch(batch, count):
    trainer = make_trainer(Centred(optax.sgd(0.1)), batch, num_microbatches=count)
    state = trainer.init_state()
    assert not mean_of(state).any()
    expected = np.zeros(3)
    for _ in range(2):
        state, _ = trainer.train_step(state, batch)
        # Of two microbatches, the even examples are the first.
        for part in (batch["points"],) if count is None else (batch["points"][::2], batch["points"][1::2]):
            expected = (expected + part.mean(axis=0)) / 2
    np.testing.assert_allclose(mean_of(state), expected, rtol=1e-5, atol=1e-6)


def test_evaluation_and_prediction_use_the_mutable_collections(batch):
    trainer = make_trainer(Centred(optax.sgd(0.1)), batch)
    state, _ = trainer.train_step(trainer.init_state(), batch)
    kernel, bias = (np.asarray(state.params["dense"][name]) for name in ("kernel", "bias"))
    expected = (batch["points"] - mean_of(state)) @ kernel + bias
    np.testing.assert_allclose(trainer.predict(state, batch)["y"], expected, rtol=1e-5, atol=1e-6)
    share = batch["weights"] / batch["weights"].sum()
    error = (share * (expected - batch["targets"]) ** 2).sum() / 4
    assert trainer.evaluate(state, [batch])["error"] == pytest.approx(error, rel=1e-5)


def test_given_mutable_collections_are_kept(batch):
    trainer = make_trainer(Centred(optax.sgd(0.1)), batch)
    state = trainer.init_state(given_mutables={("batch_stats", "norm", "mean"): jnp.full(3, 7.0)})
    np.testing.assert_array_equal(mean_of(state), [7, 7, 7])
    assert state.params["dense"]["kernel"].shape == (3, 4)


def test_mutable_collections_are_laid_out_as_their_axes_say(batch):
    class Wide(Centred):
        def get_initial_variables(self, rng, input_shapes, input_types=None):
            variables = super().get_initial_variables(rng, input_shapes)
            axes = {"norm": {"wide_axes": AxisMetadata(("mlp",))}}
            return variables | {"other": {"norm": {"wide": jnp.zeros(8)}}, "other_axes": axes}

    state = make_trainer(Wide(optax.sgd(0.1)), batch, num_partitions=2).abstract_state
    assert state.flax_mutables["other"]["norm"]["wide"].sharding.spec == PartitionSpec("model")
    assert state.flax_mutables["batch_stats"]["norm"]["mean"].sharding.spec == PartitionSpec()


@pytest.mark.parametrize(
    ("optimizer", "layout"),
    [
        (optax.sgd(0.1), {"devices": 1}),
        (optax.sgd(0.1), {"num_microbatches": 2}),
        (optimizers.muon(lambda step: 0.1), {"num_partitions": 2}),
    ],
    ids=["one device", "microbatches", "muon on two devices"],
)
def test_the_average_of_the_parameters_by_numpy(batch, optimizer, layout):
    """Muon's state has masked parts; `Centred` has a mutable collection."""
    trainer, plain = (
        make_trainer(Centred(optimizer), batch, **layout, **decay) for decay in ({"ema_decay": 0.3}, {})
    )
    state, expected_state = trainer.init_state(), plain.init_state()
    average = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.params)
    for step in range(6):
        state, _ = trainer.train_step(state, batch)
        expected_state, _ = plain.train_step(expected_state, batch)
        # The last two decays of these are 0.3: the warm-up has ended.
        decay = min(0.3, (1 + step) / (10 + step))
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * np.asarray(p), average, state.params)
        jax.tree.map(
            lambda found, a: np.testing.assert_allclose(found, a, rtol=1e-6, atol=1e-6),
            state.ema_params,
            average,
        )
    jax.tree.map(np.testing.assert_array_equal, state.params, expected_state.params)
    assert expected_state.ema_params == {}
    for found, parameter in zip(*map(jax.tree.leaves, (state.ema_params, state.params)), strict=True):
        assert (found.dtype, found.sharding) == (jnp.float32, parameter.sharding)
        assert not np.array_equal(found, parameter)


def test_evaluation_and_prediction_use_the_average(batch):
    trainer = make_trainer(Centred(optax.sgd(0.1)), batch, ema_decay=0.9)
    state, _ = trainer.train_step(trainer.init_state(), batch)
    averaged, raw = (
        trainer_lib.InferenceState(params, state.flax_mutables) for params in (state.ema_params, state.params)
    )
    for measure in (
        lambda s: trainer.evaluate(s, [batch])["error"],
        lambda s: trainer.predict(s, batch)["y"],
    ):
        np.testing.assert_array_equal(measure(state), measure(averaged))
        assert not np.array_equal(measure(state), measure(raw))


def test_the_average_begins_at_the_given_parameters(batch):
    trainer = make_trainer(Affine(optax.sgd(0.1)), batch, ema_decay=0.9)
    state = trainer.init_state({("dense", "bias"): jnp.full(4, 7.0)})
    jax.tree.map(np.testing.assert_array_equal, state.ema_params, state.params)
    np.testing.assert_array_equal(state.ema_params["dense"]["bias"], [7, 7, 7, 7])


@pytest.fixture(scope="module")
def rahf_model(make_model):
    """Makes RAHF. With Adam's large epsilon the first step shows more than the gradients' signs."""
    model = make_model("augmented_prompt")
    model.optimizer_def = optax.adam(0.02, eps=0.01)
    return model


@pytest.fixture(scope="module")
def rahf_batch(rahf_model, make_batch):
    """Makes eight examples; the first of two microbatches has no scores. The left half is hot."""
    batch = make_batch(rahf_model, 1, 2, 1, batch_size=8)
    batch["score_weights"][::2] = 0
    assert batch["score_weights"].any()
    batch["heatmap_targets"][:] = np.where(np.arange(16) < 8, 255, 0)
    return batch


@pytest.fixture(scope="module")
def rahf_params(rahf_model, rahf_batch, random_values):
    """Makes random parameters, by name."""
    shapes = {name: value.shape for name, value in rahf_batch.items()}
    variables = jax.eval_shape(lambda: rahf_model.get_initial_variables(jax.random.key(0), shapes))
    params = traverse_util.flatten_dict(random_values(variables["params"]))
    # As large as the image's own vectors it would hide the image: the scores would take long to learn.
    params["image_projection", "bias"] *= 0.1
    return params


@pytest.fixture(scope="module")
def microbatch_trainer(rahf_model, rahf_batch):
    return make_trainer(rahf_model, rahf_batch, num_microbatches=2)


def test_rahf_takes_the_same_step_on_another_mesh(rahf_model, rahf_batch, rahf_params, microbatch_trainer):
    def step(trainer):
        state, metrics = trainer.train_step(trainer.init_state(rahf_params), rahf_batch)
        return traverse_util.flatten_dict(jax.device_get(state.params)), trainer_lib.summarize([metrics])

    found, metrics = step(microbatch_trainer)
    expected, expected_metrics = step(make_trainer(rahf_model, rahf_batch, num_partitions=2))
    assert metrics.keys() == expected_metrics.keys()
    assert {"loss", "loss/heatmap", "loss/score", "loss/keywords", "gradient_norm"} < metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected_metrics[name], rtol=1e-4, err_msg=name)
    for name, start in rahf_params.items():
        # The steps, not the parameters, which they hardly move.
        steps = found[name] - start, expected[name] - start
        np.testing.assert_allclose(*steps, rtol=1e-2, atol=1e-5, err_msg="/".join(name))


def test_rahf_learns_one_batch(microbatch_trainer, rahf_batch, rahf_params):
    state, metrics = microbatch_trainer.init_state(rahf_params), []
    for _ in range(60):
        state, step_metrics = microbatch_trainer.train_step(state, rahf_batch)
        metrics.append(step_metrics)
    first, last = trainer_lib.summarize(metrics[:1]), trainer_lib.summarize(metrics[-1:])
    for name in ("loss/heatmap", "loss/score", "loss/keywords"):
        assert last[name] < 0.3 * first[name], f"{name}: {first[name]} -> {last[name]}"
