"""Metrics against scipy, scikit-learn and pysaliency, against hand-worked examples, and at the edges."""

import dataclasses
import importlib.util
import time

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from richhf_jax import feedback, metrics
from richhf_jax.feedback import RichFeedback, Token

# Both sides compute in float64 but sum in another order.
CLOSE = {"rel": 1e-9, "abs": 1e-12}


def _pysaliency(module: str):
    """Loads one file of pysaliency, because importing the package needs torch but its metrics don't."""
    [folder] = importlib.util.find_spec("pysaliency").submodule_search_locations
    spec = importlib.util.spec_from_file_location(f"pysaliency_{module}", f"{folder}/{module}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _maps(seed: int, quantised: bool) -> tuple[np.ndarray, np.ndarray]:
    """Makes a ground truth of a few disks and a noisy prediction; quantising to 8 bits makes many ties."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:48, :64]
    target = np.zeros((48, 64), np.float32)
    for row, column in rng.integers(5, 43, (3, 2)):
        target += (np.hypot(rows - row, columns - column) < 5) / np.float32(3)
    prediction = np.clip(0.3 * target + rng.normal(0.3, 0.1, target.shape), 0, 1).astype(np.float32)
    return target, np.round(prediction * 15) / 15 if quantised else prediction


@pytest.fixture(params=[False, True], ids=["distinct", "tied"])
def maps(request):
    return _maps(seed=7, quantised=request.param)


def record(id="a", labels="1 0 1", maps=None, **scores) -> RichFeedback:
    prompt = "a yellow cat"
    labels = feedback.parse_labels(labels)
    tokens = feedback.label_tokens(prompt, labels) if labels else ()
    return RichFeedback(id, prompt, scores, maps or {}, tokens)


@dataclasses.dataclass
class Object:
    mask: np.ndarray
    misaligned: bool


@dataclasses.dataclass
class Scene:
    objects: list[Object]
    artifact_region: np.ndarray
    misaligned_region: np.ndarray
    object_mask: np.ndarray


# Scores.


@pytest.mark.parametrize("decimals", [1, 12], ids=["tied", "distinct"])
def test_correlations_agree_with_scipy(decimals):
    rng = np.random.default_rng(0)
    x = rng.uniform(size=200)
    y = np.round(0.5 * x + rng.uniform(size=200), decimals)
    x = np.round(x, decimals)
    assert metrics.plcc(x, y) == pytest.approx(scipy.stats.pearsonr(x, y).statistic, **CLOSE)
    assert metrics.srcc(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, **CLOSE)


def test_correlations_by_hand():
    # Deviations (-1, 0, 1) and (-1, -1, 2): 3 / sqrt(2 * 6). Ranks (1, 2, 3) and (1.5, 1.5, 3).
    assert metrics.plcc([0, 1, 2], [1, 1, 4]) == pytest.approx(3 / np.sqrt(12))
    assert metrics.srcc([0, 1, 2], [1, 1, 4]) == pytest.approx(1.5 / np.sqrt(2 * 1.5))
    assert metrics.mse([0, 1, 2], [1, 1, 4]) == pytest.approx(5 / 3)


def test_correlation_of_tiny_values_does_not_underflow():
    assert metrics.plcc([0, 1e-200, 3e-200], [0, 1, 3]) == pytest.approx(1)


@pytest.mark.parametrize("constant", [[0.3, 0.3, 0.3], [0, 0, 0]])
def test_constant_scores_have_no_correlation(constant):
    assert metrics.plcc([0.1, 0.2, 0.4], constant) == metrics.srcc([0.1, 0.2, 0.4], constant) == 0
    assert metrics.plcc(constant, [0.1, 0.2, 0.4]) == metrics.srcc(constant, [0.1, 0.2, 0.4]) == 0


# Heatmaps.


def test_saliency_metrics_agree_with_pysaliency(maps):
    target, prediction = (m.astype(np.float64) for m in maps)
    theirs = _pysaliency("metrics")
    rows, columns = np.nonzero(target)
    assert metrics.cc(target, prediction) == pytest.approx(theirs.CC(prediction, target), **CLOSE)
    assert metrics.sim(target, prediction) == pytest.approx(theirs.SIM(prediction, target), **CLOSE)
    with np.errstate(divide="ignore"):  # pysaliency takes the logarithm of the target's zeros
        assert metrics.kld(target, prediction) == pytest.approx(theirs.MIT_KLDiv(prediction, target), **CLOSE)
    assert metrics.nss(target, prediction) == pytest.approx(
        theirs.NSS(prediction, columns, rows).mean(), **CLOSE
    )


def test_auc_judd_agrees_with_pysaliency(maps, monkeypatch):
    # NumPy 2.4 dropped the name that pysaliency 0.2.22 calls.
    monkeypatch.setattr(np, "trapz", np.trapezoid, raising=False)
    target, prediction = (m.astype(np.float64) for m in maps)
    expected, *_ = _pysaliency("numba_utils").general_roc_numba(
        prediction[target > 0], prediction[target == 0], judd=1
    )
    assert metrics.auc_judd(target, prediction) == pytest.approx(expected, **CLOSE)


def test_auc_judd_is_the_roc_area_up_to_its_coarser_thresholds(maps):
    # Straight lines between one threshold a fixated value: all tied fixated pixels lie on one line, so each
    # differs from the full curve by at most half the share of fixated pixels on it.
    target, prediction = maps
    _, counts = np.unique(prediction[target > 0], return_counts=True)
    bound = 0.5 * counts.max() / np.sum(target > 0)
    area = sklearn.metrics.roc_auc_score((target > 0).ravel(), prediction.ravel())
    assert metrics.auc_judd(target, prediction) == pytest.approx(area, rel=0, abs=bound)
    assert bound < 0.15


def test_heatmap_metrics_by_hand():
    target, prediction = np.array([[0.5, 0.0], [0.0, 0.5]]), np.array([[3.0, 1.0], [0.0, 4.0]])
    # Distributions (1/2, 0, 0, 1/2) and (3/8, 1/8, 0, 1/2).
    assert metrics.sim(target, prediction) == pytest.approx(7 / 8)
    assert metrics.kld(target, prediction) == pytest.approx(0.5 * np.log(4 / 3))
    # Mean 2, variance (1 + 1 + 4 + 4) / 4; the fixated pixels have 3 and 4.
    assert metrics.nss(target, prediction) == pytest.approx(1.5 / np.sqrt(2.5))
    assert metrics.cc(target, prediction) == pytest.approx(3 / np.sqrt(10))
    assert metrics.auc_judd(target, prediction) == 1
    # One fixated pixel, above 2 of 3 others: from (0, 0) straight to (1/3, 1), then to (1, 1).
    assert metrics.auc_judd(np.array([[1, 0, 0, 0]]), np.array([[3, 4, 1, 0]])) == pytest.approx(5 / 6)


def test_perfect_prediction():
    target, _ = _maps(seed=1, quantised=False)
    assert metrics.cc(target, target) == pytest.approx(1)
    assert metrics.kld(target, target) == pytest.approx(0, abs=1e-9)
    assert metrics.sim(target, target) == pytest.approx(1)
    assert metrics.auc_judd(target, target) == 1


def test_invariance_to_affine_change_and_to_the_order_of_pixels(maps):
    target, prediction = (m.astype(np.float64) for m in maps)
    order = np.random.default_rng(0).permutation(target.size)
    shuffled = [m.ravel()[order].reshape(m.shape) for m in (target, prediction)]
    for metric in (metrics.cc, metrics.nss, metrics.auc_judd):
        assert metric(target, 0.25 * prediction + 2) == pytest.approx(metric(target, prediction), **CLOSE)
    for metric in (metrics.kld, metrics.sim):
        assert metric(target, 0.25 * prediction) == pytest.approx(metric(target, prediction), **CLOSE)
    for metric in (metrics.cc, metrics.nss, metrics.auc_judd, metrics.kld, metrics.sim):
        assert metric(*shuffled) == pytest.approx(metric(target, prediction), **CLOSE)


@pytest.mark.parametrize("value", [0, 0.3, 1], ids=str)
def test_constant_prediction(value):
    target, _ = _maps(seed=1, quantised=False)
    prediction = np.full(target.shape, value, np.float32)
    assert metrics.cc(target, prediction) == 0
    assert metrics.nss(target, prediction) == 0
    assert metrics.auc_judd(target, prediction) == 0.5
    # Like the uniform distribution, also where the map is all 0.
    share = target / target.sum(dtype=np.float64)
    assert metrics.sim(target, prediction) == pytest.approx(np.minimum(share, 1 / target.size).sum())
    assert metrics.kld(target, prediction) == pytest.approx(
        np.log(target.size) - scipy.stats.entropy(share.ravel())
    )


def test_target_that_fixates_every_pixel():
    _, prediction = _maps(seed=1, quantised=False)
    target = np.full(prediction.shape, 1 / 3, np.float32)
    assert metrics.cc(target, prediction) == 0
    assert metrics.nss(target, prediction) == pytest.approx(0, abs=1e-6)
    assert metrics.auc_judd(target, prediction) == 0.5


def test_auc_judd_of_a_full_size_map_is_fast():
    rng = np.random.default_rng(0)
    prediction = rng.uniform(size=(512, 512)).astype(np.float32)
    target = (rng.uniform(size=(512, 512)) < 0.2).astype(np.float32)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        metrics.auc_judd(target, prediction)
        times.append(time.perf_counter() - start)
    # The fastest of five: other programs on the machine only ever slow it down.
    assert min(times) < 0.05


# Whole records.


def test_metrics_of_a_split_average_the_right_samples():
    target, prediction = _maps(seed=2, quantised=False)
    empty = np.zeros_like(target)
    targets = [
        record("a", maps={"implausibility": target, "misalignment": empty}, overall=0.2),
        record("b", maps={"implausibility": empty, "misalignment": empty}, overall=0.8),
    ]
    predictions = [
        record("a", maps={"implausibility": prediction, "misalignment": prediction}, overall=0.1),
        record("b", maps={"implausibility": empty + 0.1, "misalignment": prediction}, overall=0.4),
    ]
    result = metrics.rich_feedback_metrics(targets, predictions)
    assert result["num_examples"] == 2
    assert result["heatmap/mse_empty/implausibility"] == pytest.approx(0.01)
    mean = (metrics.mse(target, prediction) + 0.01) / 2
    assert result["heatmap/mse/implausibility"] == pytest.approx(mean)
    for name in ("cc", "kld", "sim", "nss", "auc_judd"):
        expected = getattr(metrics, name)(target, prediction)
        assert result[f"heatmap/{name}/implausibility"] == expected
        # No misalignment map has anything in it: nothing to measure, so no key.
        assert f"heatmap/{name}/misalignment" not in result
    assert result["score/plcc/overall"] == result["score/srcc/overall"] == pytest.approx(1)
    assert result["score/mse/overall"] == pytest.approx((0.01 + 0.16) / 2)
    assert not [key for key in result if "aesthetics" in key]


def test_metrics_without_an_empty_target_leave_mse_empty_out():
    target, prediction = _maps(seed=2, quantised=False)
    result = metrics.rich_feedback_metrics(
        [record(maps={"implausibility": target})], [record(maps={"implausibility": prediction})]
    )
    assert "heatmap/mse/implausibility" in result
    assert "heatmap/mse_empty/implausibility" not in result


def test_keywords_are_pooled_and_agree_with_scikit_learn():
    rng = np.random.default_rng(3)
    rows = [
        (" ".join(map(str, rng.integers(0, 2, 3))), " ".join(map(str, rng.integers(0, 2, 3))))
        for _ in range(40)
    ]
    targets = [record(str(i), truth) for i, (truth, _) in enumerate(rows)]
    predictions = [record(str(i), predicted) for i, (_, predicted) in enumerate(rows)]
    result = metrics.rich_feedback_metrics(targets, predictions)
    precision, recall, f1, _ = sklearn.metrics.precision_recall_fscore_support(
        " ".join(truth for truth, _ in rows).split(),
        " ".join(predicted for _, predicted in rows).split(),
        pos_label="0",
        average="binary",
    )
    found = [result[f"keywords/{name}"] for name in ("precision", "recall", "f1")]
    assert found == pytest.approx([precision, recall, f1], **CLOSE)


@pytest.mark.parametrize(
    ("truth", "predicted", "expected"),
    [
        ("1 1 1", "1 1 1", (0, 0, 0)),
        ("0 1 1", "1 1 1", (0, 0, 0)),
        ("1 1 1", "0 1 1", (0, 0, 0)),
        ("0 0 1", "0 1 0", (0.5, 0.5, 0.5)),
    ],
)
def test_keywords_at_the_edges(truth, predicted, expected):
    result = metrics.rich_feedback_metrics([record(labels=truth)], [record(labels=predicted)])
    assert tuple(result[f"keywords/{name}"] for name in ("precision", "recall", "f1")) == expected


def test_records_without_labels_are_not_counted():
    targets = [record("a", "0 1 1"), record("b", "")]
    predictions = [record("a", "0 1 1"), record("b", "0 0 0")]
    assert metrics.rich_feedback_metrics(targets, predictions)["keywords/precision"] == 1


@pytest.mark.parametrize(
    ("target", "prediction", "message"),
    [
        (record("x"), record("y"), "'x'.*'y'"),
        (
            record("x"),
            dataclasses.replace(record("x"), tokens=[Token("dog", False)]),
            "'x'.*tokens",
        ),
        (record("x", overall=0.1), record("x", overall=float("nan")), "'x', overall.*finite"),
        (
            record("x", maps={"implausibility": np.zeros((2, 2))}),
            record("x", maps={"implausibility": np.zeros((4, 4))}),
            r"'x', implausibility.*\(4, 4\)",
        ),
        (
            record("x", maps={"implausibility": np.zeros((2, 2))}),
            record("x", maps={"implausibility": np.full((2, 2), -1.0)}),
            "'x', implausibility.*negative",
        ),
    ],
    ids=["id", "tokens", "nan", "shape", "negative"],
)
def test_mismatches_name_the_record(target, prediction, message):
    with pytest.raises(ValueError, match=message):
        metrics.rich_feedback_metrics([target], [prediction])


def test_a_predicted_score_may_be_a_negative_cosine():
    targets = [record(name, overall=score) for name, score in (("a", 0.1), ("b", 0.5), ("c", 0.9))]
    cosines = [record(name, overall=score) for name, score in (("a", -0.3), ("b", -0.2), ("c", -0.1))]
    assert metrics.rich_feedback_metrics(targets, cosines)["score/plcc/overall"] == pytest.approx(1)
    with pytest.raises(ValueError, match="'a', overall.*negative"):
        metrics.rich_feedback_metrics(cosines, targets)


def test_counts_must_agree():
    with pytest.raises(ValueError, match="2 targets but 1 predictions"):
        metrics.rich_feedback_metrics([record("a"), record("b")], [record("a")])
    with pytest.raises(ValueError, match="no records"):
        metrics.rich_feedback_metrics([], [])


def test_a_kind_that_only_some_predictions_have_names_the_record():
    targets = [record("a", overall=0.5), record("b", overall=0.5)]
    with pytest.raises(ValueError, match="'b', overall"):
        metrics.rich_feedback_metrics(targets, [record("a", overall=0.5), record("b")])


def test_predictions_of_one_system_hold_the_same_kinds():
    empty = np.zeros((2, 2), np.float32)
    full, words = record("a", maps={"misalignment": empty}, overall=0.5), record("b", overall=0.5)
    with pytest.raises(ValueError, match="record 'b', misalignment in heatmaps: other records have a pred"):
        metrics.rich_feedback_metrics([full, words], [full, words])
    # The kind that a prediction has more counts, too, even without a target.
    with pytest.raises(ValueError, match="record 'a', aesthetics in scores"):
        metrics.rich_feedback_metrics([record("a"), record("b")], [record("a"), record("b", aesthetics=1)])
    silent = dataclasses.replace(words, tokens=None)
    with pytest.raises(ValueError, match="record 'b', words: other records have a prediction"):
        metrics.uncertainty_metrics([record("a"), words], [record("a", overall=0.1), silent])


def test_absent_outputs_have_no_metrics():
    targets = [record(maps={"implausibility": np.ones((2, 2))}, overall=0.5, alignment=0.2)]
    prediction = RichFeedback("a", "a yellow cat", {"alignment": 0.25}, {}, None)
    found = metrics.rich_feedback_metrics(targets, [prediction])
    assert found.keys() == {*(f"score/{name}/alignment" for name in ("plcc", "srcc", "mse")), "num_examples"}


def test_words_without_any_label_have_no_metrics():
    assert metrics.rich_feedback_metrics([record(labels="")], [record()]) == {"num_examples": 1}


def test_values_of_images_by_hand():
    heat, empty = np.array([[0, 0.5]], np.float32), np.zeros((1, 2), np.float32)
    targets = [
        record("a", "0 0 1", {"misalignment": heat}, overall=0.5),
        record("b", "", {"misalignment": empty}),
        record("c", "1 0 1", overall=0.75),
    ]
    answers = [
        dataclasses.replace(
            record(id, "0 1 0", {"misalignment": heat / 2}, overall=0.25), uncertainty={"overall": deviation}
        )
        for id, deviation in zip("abc", (0.1, 0.2, 0.3), strict=True)
    ]
    nan = np.nan
    own = metrics.target_values(targets)
    expected = {
        "score/overall": [0.5, nan, 0.75],
        "heatmap/pixels/misalignment": [2, 2, nan],
        "heatmap/fixated/misalignment": [1, 0, nan],
        "keywords/words": [3, nan, 3],
        "keywords/misaligned": [2, nan, 1],
    }
    assert own.keys() == expected.keys()
    for name, column in expected.items():
        np.testing.assert_array_equal(own[name], column)
    values = metrics.image_values(targets, answers)
    expected = {
        "score/overall": [0.25, nan, 0.25],
        "uncertainty/overall": [0.1, nan, 0.3],
        "heatmap/mse/misalignment": [0.03125, 0.03125, nan],
        "heatmap/mse_empty/misalignment": [nan, 0.03125, nan],
        **{
            f"heatmap/{name}/misalignment": [getattr(metrics, name)(heat, heat / 2), nan, nan]
            for name in ("cc", "kld", "sim", "nss", "auc_judd")
        },
        "keywords/tp": [1, nan, 0],
        "keywords/fp": [1, nan, 2],
        "keywords/fn": [1, nan, 1],
    }
    assert values.keys() == expected.keys()
    for name, column in expected.items():
        np.testing.assert_array_equal(values[name], column)
    found = metrics.rich_feedback_metrics(targets, answers)
    assert metrics.aggregate(own, values) | {"num_examples": 3} == found
    assert found["score/mse/overall"] == pytest.approx((0.0625 + 0.25) / 2)
    assert found["keywords/precision"] == 1 / 4


# Checks on the truth of synthetic scenes.


def _scene(misaligned: tuple[bool, ...], artifact: bool) -> Scene:
    """Makes a scene of objects side by side, each one column of 4 pixels."""
    masks = [np.arange(4)[None, :].repeat(4, 0) == i for i in range(len(misaligned))]
    none = np.zeros((4, 4), bool)
    return Scene(
        [Object(mask, wrong) for mask, wrong in zip(masks, misaligned, strict=True)],
        masks[0] if artifact else none,
        np.any([none] + [m for m, wrong in zip(masks, misaligned, strict=True) if wrong], axis=0),
        np.any(masks, axis=0),
    )


def _columns(*values: float) -> np.ndarray:
    return np.tile(np.array(values, np.float32), (4, 1))


def test_wrong_object_test_and_detection_by_hand():
    scenes = [
        _scene((True, False), artifact=True),  # passes
        _scene((True, False, False), artifact=False),  # fails: the second object is marked more
        _scene((False, True), artifact=False),  # fails: a tie
        _scene((True,), artifact=True),  # one object: not in the test
        _scene((True, True), artifact=False),  # two wrong: not in the test
        _scene((False, False), artifact=False),  # none wrong: not in the test
    ]
    misalignment = [
        _columns(0.6, 0.5, 0, 0.9),
        _columns(0.6, 0.7, 0, 0),
        _columns(0.5, 0.5, 0, 0),
        _columns(0.8, 0, 0, 0),
        _columns(0.9, 0.1, 0, 0),
        _columns(0.65, 0, 0, 0),
    ]
    implausibility = [_columns(value, 0, 0, 0) for value in (0.9, 0.1, 0.2, 0.3, 0.3, 0.1)]
    predictions = [
        record(str(i), maps={"misalignment": m, "implausibility": p})
        for i, (m, p) in enumerate(zip(misalignment, implausibility, strict=True))
    ]
    targets = [
        dataclasses.replace(p, heatmaps=dict.fromkeys(p.heatmaps, _columns(0, 0, 0, 0))) for p in predictions
    ]
    result = metrics.synthetic_metrics(targets, predictions, scenes)
    assert result["synthetic/wrong_object/num_images"] == 3
    assert result["synthetic/wrong_object/accuracy"] == pytest.approx(1 / 3)
    assert result["synthetic/wrong_object/chance"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)
    # Maxima 0.9, 0.7, 0.5, 0.8, 0.9 of flawed images against 0.65: one of five is below.
    assert result["synthetic/detection_auc/misalignment"] == pytest.approx(4 / 5)
    flawed = [scene.artifact_region.any() for scene in scenes]
    area = sklearn.metrics.roc_auc_score(flawed, [m.max() for m in implausibility])
    assert result["synthetic/detection_auc/implausibility"] == pytest.approx(area)


def test_synthetic_checks_with_nothing_to_check():
    scene = _scene((True,), artifact=True)
    prediction = record(maps={"misalignment": _columns(1, 0, 0, 0)})
    assert metrics.synthetic_metrics([prediction], [prediction], [scene]) == {
        "synthetic/wrong_object/num_images": 0
    }
    assert metrics.synthetic_metrics([prediction], [record()], [scene]) == {}


def test_synthetic_checks_need_a_truth_of_the_same_size_for_each_record():
    prediction = record("x", maps={"misalignment": np.zeros((8, 8))})
    with pytest.raises(ValueError, match=r"'x'.*4, 4"):
        metrics.synthetic_metrics([prediction], [prediction], [_scene((True,), artifact=True)])
    with pytest.raises(ValueError, match="1 targets but 0 truths"):
        metrics.synthetic_metrics([prediction], [prediction], [])


# Baselines.


def test_trivial_baseline_is_the_training_mean_from_a_stream():
    train = (
        record(str(i), maps={"implausibility": _columns(i, 0, 0, 1)}, overall=i / 4, **extra)
        for i, extra in enumerate([{}, {"alignment": 0.5}, {}])
    )
    targets = [record("t", "0 0 1"), record("u")]
    predictions = metrics.trivial_baseline(train, targets)
    assert [p.id for p in predictions] == ["t", "u"]
    assert predictions[0].scores == {"overall": pytest.approx(0.25), "alignment": 0.5}
    np.testing.assert_array_equal(predictions[1].heatmaps["implausibility"], _columns(1, 0, 0, 1))
    assert predictions[0].labels == [feedback.ALIGNED] * 3
    assert [t.text for t in predictions[0].tokens] == ["a", "yellow", "cat"]


def test_trivial_baseline_needs_a_record():
    with pytest.raises(ValueError, match="at least one"):
        metrics.trivial_baseline([], [record()])


def test_trivial_baseline_of_heatmaps_of_several_sizes():
    small, large = np.array([[0, 1.0]]), np.array([[0, 0, 1.0, 1.0], [0, 0, 0, 0]])
    train = [record("a", maps={"implausibility": heatmap}) for heatmap in (small, large)]
    targets = [record(maps={"implausibility": np.zeros(shape)}) for shape in [(1, 2), (3, 4)]]
    same, larger = (p.heatmaps["implausibility"] for p in metrics.trivial_baseline(train, targets))
    # The middle of the large one's two rows is in the lower one.
    np.testing.assert_array_equal(same, [[0, 0.5]])
    np.testing.assert_array_equal(larger, [[0, 0, 0.5, 0.5]] * 3)


def test_training_free_baseline_marks_objects_and_busy_texture():
    image = np.full((64, 64, 3), 128, np.uint8)
    image[40:56, 8:24] = np.random.default_rng(0).integers(0, 256, (16, 16, 3))
    mask = np.zeros((64, 64), bool)
    mask[:10, :10] = True
    scene = Scene([Object(mask, True)], mask, mask, mask)
    prediction, flat = metrics.training_free_baseline(
        [image, np.zeros_like(image)], [record("a"), record("b")], [scene, scene]
    )
    np.testing.assert_array_equal(prediction.heatmaps["misalignment"] == 1, mask)
    energy = prediction.heatmaps["implausibility"]
    assert energy.dtype == np.float32
    assert 0.02 < energy.max() <= 1
    row, column = np.unravel_index(energy.argmax(), energy.shape)
    assert 40 <= row < 56
    assert 8 <= column < 24
    assert energy[:20].max() < 1e-3 * energy.max()
    assert not flat.heatmaps["implausibility"].any()
    # What it does not predict is left out of the metrics.
    target = record("a", maps={"misalignment": mask.astype(np.float32)}, overall=0.5)
    result = metrics.rich_feedback_metrics([target], [prediction])
    assert {key.split("/")[0] for key in result} == {"heatmap", "num_examples"}
    assert result["heatmap/cc/misalignment"] == pytest.approx(1)


def uncertain(truths, predictions, deviations):
    """Makes targets and predictions of one kind of score."""
    targets = [record(str(i), overall=truth) for i, truth in enumerate(truths)]
    answers = [
        dataclasses.replace(record(str(i), overall=score), uncertainty={"overall": deviation})
        for i, (score, deviation) in enumerate(zip(predictions, deviations, strict=True))
    ]
    return targets, answers


def test_uncertainty_by_hand():
    # Errors of 0 to 2.5 standard deviations: three are in the 68 % (up to 0.994), four in the 95 % (1.960).
    deviations = [0.1, 0.04, 0.2, 0.1, 0.1]
    truths = [0.5, 0.52, 0.3 + 0.198, 0.15, 0.75]
    targets, answers = uncertain(truths, [0.5, 0.5, 0.3, 0.3, 0.5], deviations)
    found = metrics.uncertainty_metrics(targets, answers)
    assert found.keys() == {f"score/{name}/overall" for name in ("coverage68", "coverage95", "nll")}
    assert found["score/coverage68/overall"] == pytest.approx(3 / 5)
    assert found["score/coverage95/overall"] == pytest.approx(4 / 5)
    z = [0, 0.5, 0.99, 1.5, 2.5]
    nll = [np.log(s) + np.log(2 * np.pi) / 2 + z**2 / 2 for s, z in zip(deviations, z, strict=True)]
    assert found["score/nll/overall"] == pytest.approx(np.mean(nll))
    assert found.items() <= metrics.rich_feedback_metrics(targets, answers).items()


def test_no_uncertainty_no_metrics_of_it():
    targets = [record("a", overall=0.5)]
    assert metrics.uncertainty_metrics(targets, targets) == metrics.deviation_factors(targets, targets) == {}


def test_factors_by_hand():
    # Errors of 3 and 1 standard deviations: the mean square is 5. The third record has no label.
    targets, answers = uncertain([0.8, 0.3, 0.9], [0.5, 0.2, 0.1], [0.1, 0.1, 0.1])
    targets[2] = record("2")
    factors = metrics.deviation_factors(targets, answers)
    assert factors == {"overall": pytest.approx(np.sqrt(5))}
    calibrated = [answer.calibrated(factors) for answer in answers]
    assert metrics.deviation_factors(targets, calibrated) == {"overall": pytest.approx(1)}


def test_factors_make_normal_errors_right(rng):
    """Uncertainties are half of the true ones: the factor is 2, and intervals then hold what they say."""
    deviations = rng.uniform(0.01, 0.1, 4_000)
    predictions = np.full(4_000, 0.5)
    truths = np.clip(predictions + deviations * rng.standard_normal(4_000), 0, 1)
    targets, answers = uncertain(truths, predictions, deviations / 2)
    before = metrics.uncertainty_metrics(targets, answers)
    factors = metrics.deviation_factors(targets, answers)
    assert factors["overall"] == pytest.approx(2, rel=0.04)
    after = metrics.uncertainty_metrics(targets, [answer.calibrated(factors) for answer in answers])
    # The standard error of a share of 4,000 is 0.008.
    assert before["score/coverage68/overall"] == pytest.approx(0.38, abs=0.025)
    assert after["score/coverage68/overall"] == pytest.approx(0.68, abs=0.025)
    assert after["score/coverage95/overall"] == pytest.approx(0.95, abs=0.025)
    assert after["score/nll/overall"] < before["score/nll/overall"]


@pytest.mark.parametrize("deviation", [0, -0.1, np.nan, np.inf])
def test_an_uncertainty_must_be_above_0(deviation):
    targets, answers = uncertain([0.5, 0.5], [0.5, 0.5], [0.1, deviation])
    with pytest.raises(ValueError, match=r"record '1': the uncertainty of overall must be above 0"):
        metrics.uncertainty_metrics(targets, answers)
