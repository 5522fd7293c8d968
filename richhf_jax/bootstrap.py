"""Intervals of metrics by the bootstrap over images (Efron 1979): all systems see the same resampled images.

The metrics are those of `metrics.aggregate`, here for many resamples at once: a resample is a row of weights
that says how often it has each image.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from richhf_jax import feedback, metrics

# Interval of 95 %, in percent.
PERCENTILES = (2.5, 97.5)
# Most numbers of an array of weights.
_BLOCK = 2**20

Samples = Mapping[str, np.ndarray]  # Metric -> float64 [resamples]; NaN where a resample has no such value.


def samples(
    targets: metrics.Columns, systems: Sequence[metrics.Columns], images: int, resamples: int, seed: int
) -> list[Samples]:
    """Computes the metrics of each system on the same resamples of the images.

    Args:
      targets: `metrics.target_values`.
      systems: `metrics.image_values` of each system, in the same order.
      images: number of images, which is also that of a resample.
      resamples: number of resamples.
      seed: of the draw.

    Returns:
      For each system its "score/{plcc,srcc,mse}/<kind>", "heatmap/..." and "keywords/...".
    """
    found: list[list[Samples]] = [[] for _ in systems]
    for weights in _weights(images, resamples, seed):
        for blocks, values in zip(found, systems, strict=True):
            blocks.append(resampled(targets, values, weights))
    return [{key: np.concatenate([b[key] for b in blocks]) for key in blocks[0]} for blocks in found]


def interval(values: np.ndarray) -> tuple[float, float]:
    """Returns the 95 % percentile interval of a metric's values; NaN if no resample has one."""
    values = values[~np.isnan(values)]
    low, high = np.percentile(values, PERCENTILES) if len(values) else (np.nan, np.nan)
    return float(low), float(high)


def _weights(images: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yields float64 [some resamples, images]: how often a resample has an image."""
    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK // images)
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        yield rng.multinomial(images, np.full(images, 1 / images), size).astype(np.float64)


def resampled(targets: metrics.Columns, values: metrics.Columns, weights: np.ndarray) -> Samples:
    """Computes a system's metrics for each row of weights [resamples, images]."""
    found: dict[str, np.ndarray] = {}
    for kind in feedback.SCORES:
        if f"score/{kind}" not in values:
            continue
        predicted = values[f"score/{kind}"]
        has_score = ~np.isnan(predicted)
        x, y, w = targets[f"score/{kind}"][has_score], predicted[has_score], weights[:, has_score]
        is_constant = _is_constant(x, w) | _is_constant(y, w)
        found[f"score/plcc/{kind}"] = _correlation(x, y, w, is_constant)
        found[f"score/srcc/{kind}"] = _correlation(_ranks(x, w), _ranks(y, w), w, is_constant)
        found[f"score/mse/{kind}"] = _mean(np.square(x - y), w)[:, 0]
    for name, column in values.items():
        if name.startswith("heatmap/"):
            has_value = ~np.isnan(column)
            found[name] = _mean(column[has_value], weights[:, has_value])[:, 0]
    if "keywords/tp" in values:
        counts = (weights @ np.nan_to_num(values[f"keywords/{name}"]) for name in ("tp", "fp", "fn"))
        found |= {f"keywords/{name}": rate for name, rate in metrics.keyword_rates(*counts).items()}
    return found


def _mean(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns weighted means [resamples, 1] of x [images] or [resamples, images]; NaN without an image."""
    with np.errstate(invalid="ignore"):
        return np.sum(weights * x, -1, keepdims=True) / np.sum(weights, -1, keepdims=True)


def _is_constant(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns for each resample whether all its images have the same value; false without an image."""
    drawn = weights > 0
    highest = np.where(drawn, x, -np.inf).max(-1, initial=-np.inf)
    return highest == np.where(drawn, x, np.inf).min(-1, initial=np.inf)


def _correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray, is_constant: np.ndarray) -> np.ndarray:
    """Returns Pearson's weighted correlation [resamples]; 0 where a list is constant."""
    x, y = x - _mean(x, weights), y - _mean(y, weights)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.sqrt(np.sum(weights * x * x, -1) * np.sum(weights * y * y, -1))
        result = np.clip(np.sum(weights * x * y, -1) / scale, -1, 1)
    return np.where(is_constant, 0, result)


def _ranks(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the rank of each image in each resample [resamples, images]; equal values share their mean."""
    values, group = np.unique(x, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(values)))
    if not len(values):
        return weights
    counts = np.add.reduceat(weights[:, order], starts, axis=1)
    return (np.cumsum(counts, axis=1) - (counts - 1) / 2)[:, group]
