"""The paper's evaluation protocol (section 4.2), by numpy and scipy alone.

Scores: PLCC, SRCC and MSE over the split. Heatmaps: the saliency metrics of Bylinskii et al., "What do
different evaluation metrics tell us about saliency models?" (https://arxiv.org/abs/1604.03605), where a
pixel whose ground truth is above 0 counts as a fixation. Keywords: precision, recall and F1 of the
misaligned words, pooled over the tokens of all samples. Beyond the paper, uncertainties of scores are checked
against their errors.

No metric is ever NaN. Where a formula is undefined, these rules hold:

- a constant map or a constant list of scores orders nothing: CC, NSS, PLCC and SRCC are 0, AUC-Judd is 0.5;
- a map that is 0 everywhere prefers no place: KLD and SIM take it as the uniform distribution;
- 0/0 in precision, recall and F1 is 0;
- a metric without any sample (`mse_empty` where no ground truth is empty, a kind that the predictions lack)
  is left out of the result.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Real
from scipy import ndimage, stats

from richhf_jax import feedback
from richhf_jax.feedback import RichFeedback

# Regulariser of KLD in the reference code of the MIT/Tuebingen saliency benchmark (MATLAB's eps).
KLD_EPSILON = 2.2204e-16

Scores = Sequence[float] | Real[np.ndarray, " examples"]
Heatmap = Real[np.ndarray, "height width"]
# Name of a value -> float64 [images], NaN where an image has no such value.
Columns = Mapping[str, Real[np.ndarray, " images"]]


@runtime_checkable
class ObjectTruth(Protocol):
    """An object of a synthetic scene: its pixels, and whether it contradicts the prompt."""

    mask: Bool[np.ndarray, "height width"]
    misaligned: bool


@runtime_checkable
class SceneTruth(Protocol):
    """The true contents of a synthetic scene, known from its construction."""

    objects: Sequence[ObjectTruth]
    artifact_region: Bool[np.ndarray, "height width"]
    misaligned_region: Bool[np.ndarray, "height width"]
    object_mask: Bool[np.ndarray, "height width"]


# Scores: two equally long lists of floats.


def plcc(targets: Scores, predictions: Scores) -> float:
    """Pearson's linear correlation in [-1, 1]; 0 where either list is constant (or a single value)."""
    return _correlation(np.asarray(targets, np.float64), np.asarray(predictions, np.float64))


def srcc(targets: Scores, predictions: Scores) -> float:
    """Spearman's rank correlation in [-1, 1]: PLCC of the ranks; tied values share their mean rank."""
    return _correlation(stats.rankdata(targets), stats.rankdata(predictions))


def mse(targets: Any, predictions: Any) -> float:
    """Mean squared error of two equally shaped arrays (lists of scores, or heatmaps)."""
    return float(np.mean(np.square(np.asarray(targets, np.float64) - np.asarray(predictions, np.float64))))


# Heatmaps: two maps of non-negative numbers; the target is above 0 somewhere.


def cc(target: Heatmap, prediction: Heatmap) -> float:
    """Correlation coefficient of two maps in [-1, 1]; 0 where either is constant."""
    return _correlation(np.asarray(target, np.float64).ravel(), np.asarray(prediction, np.float64).ravel())


def kld(target: Heatmap, prediction: Heatmap) -> float:
    """Kullback-Leibler divergence of the target's distribution from the prediction's, in nats; 0 is best."""
    target, prediction = _distribution(target), _distribution(prediction)
    return float(np.sum(target * np.log(KLD_EPSILON + target / (KLD_EPSILON + prediction))))


def sim(target: Heatmap, prediction: Heatmap) -> float:
    """Similarity in [0, 1]: the histogram intersection of the two maps' distributions."""
    return float(np.sum(np.minimum(_distribution(target), _distribution(prediction))))


def nss(target: Heatmap, prediction: Heatmap) -> float:
    """Normalised scanpath saliency: mean of the standardised prediction over the fixated pixels.

    The unit is the prediction's standard deviation. A constant prediction has 0.
    """
    prediction = np.asarray(prediction, np.float64)
    if np.ptp(prediction) == 0:
        return 0.0
    return float((np.mean(prediction[target > 0]) - np.mean(prediction)) / np.std(prediction))


def auc_judd(target: Heatmap, prediction: Heatmap) -> float:
    """Area under the ROC curve of telling fixated from other pixels, with thresholds at the fixated values.

    The curve runs in straight lines from (0, 0) to (1, 1), with one point for each distinct predicted value
    of a fixated pixel. The published code takes the fixations one by one, and adds random noise so that no
    two values are equal. Here tied pixels pass a threshold together. That needs no noise, gives a constant
    map 0.5, and equals the published code exactly where nothing is tied. Where every pixel is fixated, the
    result is 0.5, too.
    """
    fixated = np.asarray(target) > 0
    prediction = np.asarray(prediction)
    positives, negatives = np.sort(prediction[fixated]), np.sort(prediction[~fixated])
    if not len(positives) or not len(negatives):
        return 0.5
    thresholds = np.unique(positives)[::-1]
    hit_rate = 1 - np.searchsorted(positives, thresholds, side="left") / len(positives)
    false_alarm_rate = 1 - np.searchsorted(negatives, thresholds, side="left") / len(negatives)
    return float(
        np.trapezoid(np.concatenate([[0], hit_rate, [1]]), np.concatenate([[0], false_alarm_rate, [1]]))
    )


_SALIENCY_METRICS = {"cc": cc, "kld": kld, "sim": sim, "nss": nss, "auc_judd": auc_judd}


# Whole records.


def rich_feedback_metrics(
    targets: Sequence[RichFeedback], predictions: Sequence[RichFeedback], values: Columns | None = None
) -> dict[str, float]:
    """Computes every metric of the protocol over a split: `aggregate` of the images' values.

    A kind is measured on the records whose target has it; a kind that the predictions lack is left out. A
    heatmap's MSE is taken over all records, `mse_empty` over those with an empty ground truth, and the other
    metrics over the rest.

    Args:
      targets: the feedback of people (or of the builder's simulated raters).
      predictions: feedback for the same images in the same order; heatmaps have the targets' sizes. All
        predictions hold the same kinds.
      values: their `image_values`, if these are known.

    Returns:
      "score/{plcc,srcc,mse}/<kind>", the results of `uncertainty_metrics`,
      "heatmap/{mse,mse_empty,cc,kld,sim,nss,auc_judd}/<kind>",
      "keywords/{precision,recall,f1}" as shares in [0, 1], and "num_examples".

    Raises:
      ValueError: targets and predictions do not pair up, predictions differ in what they hold, or a value is
        negative or not finite; the message names the record.
    """
    values = image_values(targets, predictions) if values is None else values
    return aggregate(target_values(targets), values) | {"num_examples": len(targets)}


def target_values(targets: Sequence[RichFeedback]) -> dict[str, np.ndarray]:
    """Returns the images' own values.

    Returns:
      "score/<kind>"; "heatmap/{pixels,fixated}/<kind>", numbers of pixels; and "keywords/{words,misaligned}",
      numbers of words.
    """
    found: dict[str, dict[int, float]] = {}
    for i, target in enumerate(targets):
        row: dict[str, float] = {f"score/{kind}": score for kind, score in target.scores.items()}
        for kind, heatmap in target.heatmaps.items():
            row[f"heatmap/pixels/{kind}"] = heatmap.size
            row[f"heatmap/fixated/{kind}"] = np.count_nonzero(heatmap > 0)
        if target.tokens:
            row["keywords/words"] = len(target.tokens)
            row["keywords/misaligned"] = target.labels.count(feedback.MISALIGNED)
        for name, value in row.items():
            found.setdefault(name, {})[i] = value
    return _columns(found, len(targets))


def image_values(
    targets: Sequence[RichFeedback], predictions: Sequence[RichFeedback]
) -> dict[str, np.ndarray]:
    """Measures each image: all that `aggregate` needs of a system.

    Args:
      targets, predictions: as for `rich_feedback_metrics`.

    Returns:
      "score/<kind>" and "uncertainty/<kind>" as predicted, "heatmap/<metric>/<kind>", and
      "keywords/{tp,fp,fn}", numbers of words that are rightly flagged, wrongly flagged and missed. An image
      has no value where its target lacks the kind, and where the metric leaves it out. A name without any
      value is left out.

    Raises:
      ValueError: as `rich_feedback_metrics`.
    """
    _check_pairs(targets, predictions)
    found = _score_values(targets, predictions)
    for kind in feedback.HEATMAPS:
        for i, target, prediction in _pairs("heatmaps", kind, targets, predictions):
            for name, value in _heatmap_values(target, prediction).items():
                found.setdefault(f"heatmap/{name}/{kind}", {})[i] = value
    found |= _keyword_values(targets, predictions)
    return _columns(found, len(targets))


def aggregate(targets: Columns, values: Columns) -> dict[str, float]:
    """Computes the metrics of a split from its images' values.

    Args:
      targets: `target_values`.
      values: `image_values` of the same images in the same order.

    Returns:
      As `rich_feedback_metrics`, without "num_examples".
    """
    results: dict[str, float] = {}
    for kind in feedback.SCORES:
        if f"score/{kind}" in values:
            truth, predicted = _measured(targets[f"score/{kind}"], values[f"score/{kind}"])
            results |= {f"score/{f.__name__}/{kind}": f(truth, predicted) for f in (plcc, srcc, mse)}
    results |= _uncertainty_metrics(targets, values)
    for name, column in values.items():
        if name.startswith("heatmap/"):
            results[name] = float(np.mean(*_measured(column)))
    if "keywords/tp" in values:
        counts = (values[f"keywords/{name}"] for name in ("tp", "fp", "fn"))
        rates = keyword_rates(*(np.sum(*_measured(column)) for column in counts))
        results |= {f"keywords/{name}": float(rate) for name, rate in rates.items()}
    return results


def keyword_rates(tp: Any, fp: Any, fn: Any) -> dict[str, Any]:
    """Returns precision, recall and F1 of numbers of words, or of arrays of such numbers."""
    return {
        "precision": tp / np.maximum(tp + fp, 1),
        "recall": tp / np.maximum(tp + fn, 1),
        "f1": 2 * tp / np.maximum(2 * tp + fp + fn, 1),
    }


def uncertainty_metrics(
    targets: Sequence[RichFeedback], predictions: Sequence[RichFeedback]
) -> dict[str, float]:
    """Checks the scores' uncertainties against their errors.

    Returns:
      "score/coverage68/<kind>" and "score/coverage95/<kind>": share of targets inside the central interval of
        that probability of a normal distribution with the predicted score and uncertainty: 0.68 and 0.95 are
        right, less is overconfident.
      "score/nll/<kind>": mean negative log-likelihood of the targets under these distributions, in nats.
      {} if the predictions have no uncertainty.

    Raises:
      ValueError: targets and predictions do not pair up; the record is named.
    """
    _check_pairs(targets, predictions)
    values = _columns(_score_values(targets, predictions), len(targets))
    return _uncertainty_metrics(target_values(targets), values)


def _uncertainty_metrics(targets: Columns, values: Columns) -> dict[str, float]:
    results = {}
    for kind, (errors, deviations) in _errors_and_deviations(targets, values).items():
        z = np.abs(errors / deviations)
        for share in (0.68, 0.95):
            inside = z <= stats.norm.ppf((1 + share) / 2)
            results[f"score/coverage{share:.0%}/{kind}".replace("%", "")] = float(np.mean(inside))
        results[f"score/nll/{kind}"] = float(-np.mean(stats.norm.logpdf(errors, scale=deviations)))
    return results


def deviation_factors(
    targets: Sequence[RichFeedback], predictions: Sequence[RichFeedback]
) -> dict[str, float]:
    """Returns for each kind the factor of its uncertainties that makes them as large as the errors are.

    With it, the mean of (error / uncertainty)^2 is 1, and the likelihood of the targets is the greatest that
    a factor can reach. Predictions that are all right have the factor 0.

    Raises:
      ValueError: as `uncertainty_metrics`.
    """
    _check_pairs(targets, predictions)
    values = _columns(_score_values(targets, predictions), len(targets))
    return {
        kind: float(np.sqrt(np.mean(np.square(errors / deviations))))
        for kind, (errors, deviations) in _errors_and_deviations(target_values(targets), values).items()
    }


def _errors_and_deviations(targets: Columns, values: Columns) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns for each kind with an uncertainty the errors of its scores, and their standard deviations."""
    found = {}
    for kind in feedback.SCORES:
        if f"uncertainty/{kind}" in values:
            truth, predicted, deviations = _measured(
                targets[f"score/{kind}"], values[f"score/{kind}"], values[f"uncertainty/{kind}"]
            )
            found[kind] = truth - predicted, deviations
    return found


def synthetic_metrics(
    targets: Sequence[RichFeedback], predictions: Sequence[RichFeedback], truths: Sequence[SceneTruth]
) -> dict[str, float]:
    """Checks heatmaps against the truth of synthetic scenes.

    Detection asks: does a heatmap's maximum tell images with a flawed region from those without? (A scene
    whose only flaw is a missing object has no misaligned region.) The wrong-object test takes images with
    several objects, one of them misaligned, and asks: has this one a higher mean predicted misalignment than
    every other? A tie is a miss, so a map that marks all objects exactly alike never passes.

    Returns:
      "synthetic/detection_auc/<kind>": area under the ROC curve, 0.5 is chance.
      "synthetic/wrong_object/{accuracy,chance,num_images}": share of images that pass, mean of
        1 / number of objects, and number of images tested.

    Raises:
      ValueError: targets, predictions and truths do not pair up; the record is named.
    """
    _check_pairs(targets, predictions)
    if len(truths) != len(targets):
        raise ValueError(f"{len(targets)} targets but {len(truths)} truths of scenes")
    for target, truth in zip(targets, truths, strict=True):
        if any(heatmap.shape != truth.object_mask.shape for heatmap in target.heatmaps.values()):
            raise ValueError(f"record {target.id!r}: the scene's truth is of {truth.object_mask.shape}")
    regions = {feedback.IMPLAUSIBILITY: "artifact_region", feedback.MISALIGNMENT: "misaligned_region"}
    results: dict[str, float] = {}
    for kind, region in regions.items():
        pairs = [(truths[i], heatmap) for i, _, heatmap in _pairs("heatmaps", kind, targets, predictions)]
        flawed = np.array([getattr(truth, region).any() for truth, _ in pairs], bool)
        peaks = np.array([heatmap.max() for _, heatmap in pairs])
        if flawed.any() and not flawed.all():
            results[f"synthetic/detection_auc/{kind}"] = _roc_auc(flawed, peaks)
        if kind == feedback.MISALIGNMENT and pairs:
            results |= _wrong_object_metrics(pairs)
    return results


# Baselines to stand beside a model.


def trivial_baseline(
    train_targets: Iterable[RichFeedback], targets: Sequence[RichFeedback]
) -> list[RichFeedback]:
    """Predicts without looking at the image: the mean score, the mean training heatmap, no misaligned word.

    Args:
      train_targets: the training split. It may be a stream, since only sums are kept. Heatmaps of other sizes
        than the first (letterboxed images have such) are stretched to its size before the mean.
      targets: the records to predict; the mean heatmap is stretched to the size of each one's.

    Raises:
      ValueError: there is no training record.
    """
    sums: dict[tuple[str, str], Any] = {}
    counts: dict[tuple[str, str], int] = {}
    for record in train_targets:
        for field in ("scores", "heatmaps"):
            for kind, value in getattr(record, field).items():
                value = np.asarray(value, np.float64)
                total = sums.get((field, kind), np.zeros_like(value))
                sums[field, kind] = total + _stretch(value, total.shape)
                counts[field, kind] = counts.get((field, kind), 0) + 1
    if not sums:
        raise ValueError("the trivial baseline needs at least one training record")
    means = {key: total / counts[key] for key, total in sums.items()}
    scores = {kind: float(value) for (field, kind), value in means.items() if field == "scores"}
    heatmaps = {
        kind: value.astype(np.float32) for (field, kind), value in means.items() if field == "heatmaps"
    }
    return [
        RichFeedback(
            t.id,
            t.prompt,
            scores,
            {
                kind: _stretch(mean, t.heatmaps[kind].shape if kind in t.heatmaps else mean.shape)
                for kind, mean in heatmaps.items()
            },
            [feedback.Token(token.text, False) for token in t.tokens or ()],
        )
        for t in targets
    ]


def _stretch(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The nearest pixels of an array for each of another shape's; an array of this shape as it is."""
    if array.shape == shape:
        return array
    nearest = (
        (2 * np.arange(new) + 1) * old // (2 * new) for old, new in zip(array.shape, shape, strict=True)
    )
    return array[np.ix_(*nearest)]


def training_free_baseline(
    images: Sequence[np.ndarray], targets: Sequence[RichFeedback], truths: Sequence[SceneTruth]
) -> list[RichFeedback]:
    """Heatmaps that need no training: every object is misaligned, every busy texture is implausible.

    Args:
      images: uint8 [height, width, 3].
      targets: the records to answer for, in the images' order.
      truths: the scenes' truth; only `object_mask` is used.

    Returns:
      Records with heatmaps alone: no scores, no tokens.
    """
    return [
        RichFeedback(
            t.id,
            t.prompt,
            {},
            {
                feedback.IMPLAUSIBILITY: _high_frequency_energy(image),
                feedback.MISALIGNMENT: truth.object_mask.astype(np.float32),
            },
            None,
        )
        for image, t, truth in zip(images, targets, truths, strict=True)
    ]


def _high_frequency_energy(image: np.ndarray) -> np.ndarray:
    """Local energy of fine detail: uint8 [height, width, 3] -> float32 [height, width] in [0, 1].

    Detail is the part that a blur of height/64 removes. Its square is pooled over the radius of a rater's
    disk. All images share one scale: 1 is the energy of a black and white checkerboard of single pixels.
    """
    height = image.shape[0]
    grey = image.astype(np.float32).mean(axis=-1)
    detail = (grey - ndimage.gaussian_filter(grey, height / 64)) / 127.5
    energy = ndimage.gaussian_filter(np.square(detail), height * feedback.POINT_RADIUS)
    return np.minimum(energy, 1)


def _columns(found: Mapping[str, Mapping[int, float]], size: int) -> dict[str, np.ndarray]:
    """Returns name -> float64 [size] of values by the image's index, NaN where there is none."""
    columns = {}
    for name, values in found.items():
        columns[name] = np.full(size, np.nan)
        columns[name][list(values)] = list(values.values())
    return columns


def _measured(*columns: np.ndarray) -> list[np.ndarray]:
    """Returns the values of the images that have one in the last column."""
    return [column[~np.isnan(columns[-1])] for column in columns]


def _score_values(targets, predictions) -> dict[str, dict[int, float]]:
    found = {}
    for kind in feedback.SCORES:
        if not (pairs := _pairs("scores", kind, targets, predictions)):
            continue
        found[f"score/{kind}"] = {i: score for i, _, score in pairs}
        if not any(kind in prediction.uncertainty for prediction in predictions):
            continue
        deviations = {i: predictions[i].uncertainty.get(kind, 0) for i, _, _ in pairs}
        for i, deviation in deviations.items():
            if not 0 < deviation < np.inf:
                raise ValueError(
                    f"record {targets[i].id!r}: the uncertainty of {kind} must be above 0, got {deviation}"
                )
        found[f"uncertainty/{kind}"] = deviations
    return found


def _heatmap_values(target: np.ndarray, prediction: np.ndarray) -> dict[str, float]:
    error = mse(target, prediction)
    if not target.any():
        return {"mse": error, "mse_empty": error}
    return {"mse": error} | {name: metric(target, prediction) for name, metric in _SALIENCY_METRICS.items()}


def _keyword_values(targets, predictions) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for i, (target, prediction) in enumerate(zip(targets, predictions, strict=True)):
        # Records whose labels are unknown have no tokens.
        if prediction.tokens is None or not target.tokens:
            continue
        if [t.text for t in target.tokens] != [t.text for t in prediction.tokens]:
            raise ValueError(f"record {target.id!r}: the prediction's tokens are not the target's")
        truth = np.array([t.misaligned for t in target.tokens])
        predicted = np.array([t.misaligned for t in prediction.tokens])
        counts = {"tp": truth & predicted, "fp": ~truth & predicted, "fn": truth & ~predicted}
        for name, words in counts.items():
            found.setdefault(f"keywords/{name}", {})[i] = int(np.sum(words))
    return found


def _wrong_object_metrics(pairs) -> dict[str, float]:
    passed, chances = [], []
    for truth, heatmap in pairs:
        objects = [o for o in truth.objects if o.mask.any()]
        if len(objects) < 2 or sum(o.misaligned for o in objects) != 1:
            continue
        wrong = next(heatmap[o.mask].mean() for o in objects if o.misaligned)
        passed.append(all(wrong > heatmap[o.mask].mean() for o in objects if not o.misaligned))
        chances.append(1 / len(objects))
    prefix = "synthetic/wrong_object"
    results: dict[str, float] = {f"{prefix}/num_images": len(passed)}
    if passed:
        results |= {f"{prefix}/accuracy": float(np.mean(passed)), f"{prefix}/chance": float(np.mean(chances))}
    return results


def _check_pairs(targets: Sequence[RichFeedback], predictions: Sequence[RichFeedback]) -> None:
    if len(targets) != len(predictions):
        raise ValueError(f"{len(targets)} targets but {len(predictions)} predictions")
    if not targets:
        raise ValueError("there are no records to evaluate")
    for i, (target, prediction) in enumerate(zip(targets, predictions, strict=True)):
        if target.id != prediction.id:
            raise ValueError(
                f"record {i}: the target is {target.id!r} but the prediction is {prediction.id!r}"
            )
    _check_same_outputs(predictions)


def _check_same_outputs(predictions: Sequence[RichFeedback]) -> None:
    """Raises a ValueError if a prediction lacks what another one of the same system has."""

    def held(prediction: RichFeedback) -> list[str]:
        kinds = [
            f"{kind} in {field}" for field in ("scores", "heatmaps") for kind in getattr(prediction, field)
        ]
        return kinds if prediction.tokens is None else [*kinds, "words"]

    every = dict.fromkeys(name for prediction in predictions for name in held(prediction))
    for prediction in predictions:
        if missing := [name for name in every if name not in held(prediction)]:
            raise ValueError(
                f"record {prediction.id!r}, {missing[0]}: other records have a prediction, this one has none"
            )


def _pairs(field: str, kind: str, targets, predictions) -> list[tuple[int, Any, Any]]:
    """Returns (index, target's value, predicted value) of the records whose target has the kind."""
    pairs = []
    for i, (target, prediction) in enumerate(zip(targets, predictions, strict=True)):
        wanted, given = getattr(target, field), getattr(prediction, field)
        if kind not in wanted or kind not in given:
            continue
        where = f"record {target.id!r}, {kind} in {field}"
        if np.shape(wanted[kind]) != np.shape(given[kind]):
            raise ValueError(f"{where}: predicted {np.shape(given[kind])}, target {np.shape(wanted[kind])}")
        for value in (wanted[kind], given[kind]):
            # A predicted score may be a cosine.
            may_be_negative = field == "scores" and value is given[kind]
            if not np.isfinite(value).all() or (np.min(value) < 0 and not may_be_negative):
                raise ValueError(f"{where}: negative or not finite")
        pairs.append((i, wanted[kind], given[kind]))
    return pairs


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    # The division keeps the sums of squares of tiny values from underflowing.
    x, y = x / np.abs(x).max(), y / np.abs(y).max()
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1, 1))


def _distribution(heatmap: np.ndarray) -> np.ndarray:
    heatmap = np.asarray(heatmap, np.float64)
    total = heatmap.sum()
    return heatmap / total if total else np.full(heatmap.shape, 1 / heatmap.size)


def _roc_auc(positive: np.ndarray, values: np.ndarray) -> float:
    """Probability that a positive's value is above a negative's; a tie counts half (Mann-Whitney)."""
    n = positive.sum()
    return float((stats.rankdata(values)[positive].sum() - n * (n + 1) / 2) / (n * (len(values) - n)))
