"""Simulates three raters of the procedural scenes: they click, miss, err and rate.

A rater first notices or misses each flaw. A missed flaw gets no clicks, no marked words and no bad rating.
Raters also click where nothing is wrong and mark wrong words. The constants below give all probabilities.
The answers are raw ratings (`ratings.py`).

    python -m richhf_jax.datasets.raters --out=raw.jsonl --num=100
"""

import argparse
import math
import pathlib
from collections.abc import Sequence

import numpy as np

from richhf_jax import errors, feedback, writing
from richhf_jax.datasets import prompts, ratings, scenes

TOOL_VERSION = "simulated-raters-1"

# Points that a rater tends to add to every rating.
LEANINGS = {"rater-0": -0.15, "rater-1": 0.0, "rater-2": 0.15}
RATING_NOISE = 0.35
P_MISS = 0.1  # of missing a flaw
P_SPURIOUS_CLICK = 0.01  # for each image and kind of click
P_LABEL_SLIP = 0.02  # of the wrong label for a token
# Spacing of the grid of clicks, in disk radii: their disks cover nearly the whole region.
CLICK_SPACING = 1.4
CLICK_JITTER = 0.2  # standard deviation around the grid's points, in disk radii
P_CLICK_LEFT_OUT = 0.1  # for each point of the grid

# Points of the Likert scale, before noise.
BEST = 4.9
ARTIFACT_COST, ARTIFACT_AREA_COST = 1.2, 7.0  # for each artifact; times its share of the picture
MISALIGNMENT_COSTS = {"colour": 2.3, "shape": 2.4, "size": 1.7, "count": 1.9, "missing": 2.8}
SECOND_MISALIGNMENT = 0.4  # factor of the smaller of two costs
BACKGROUND_CHARM = {"gradient": 1.5, "plain": 0.9, "stripes": 0.5, "checks": 0.0}
PLAIN_AESTHETICS, COLOUR_CHARM, IMBALANCE_COST, ARTIFACT_UGLINESS = 2.4, 1.0, 1.3, 0.4
OVERALL_WEIGHTS = {feedback.PLAUSIBILITY: 0.4, feedback.ALIGNMENT: 0.35, feedback.AESTHETICS: 0.25}


def opinions(
    truth: scenes.SceneTruth, areas: list[float], misalignments: list[prompts.Misalignment]
) -> dict[str, float]:
    """Computes what a rater thinks who noticed these flaws.

    Args:
      truth: the truth about the picture.
      areas: areas of the noticed artifacts, as shares of the picture.
      misalignments: the noticed misalignments.

    Returns:
      Kind of score -> points of the Likert scale, before noise.
    """
    return points(beauty(truth.scene), areas, misalignments)


def points(
    beauty_points: float, areas: Sequence[float], misalignments: Sequence[prompts.Misalignment]
) -> dict[str, float]:
    """Computes `opinions` of a picture whose beauty, see `beauty`, is known."""
    costs = sorted((MISALIGNMENT_COSTS[m.kind] for m in misalignments), reverse=True)
    found = {
        feedback.PLAUSIBILITY: BEST - sum(ARTIFACT_COST + ARTIFACT_AREA_COST * area for area in areas),
        feedback.ALIGNMENT: BEST
        - sum(cost * (SECOND_MISALIGNMENT if i else 1) for i, cost in enumerate(costs)),
        feedback.AESTHETICS: beauty_points - ARTIFACT_UGLINESS * len(areas),
    }
    overall = sum(weight * found[kind] for kind, weight in OVERALL_WEIGHTS.items())
    return found | {feedback.OVERALL: overall}


def beauty(scene: scenes.Scene) -> float:
    """Returns the points for the background's kind and colour and for a balanced composition."""
    weight = sum(t.radius**2 for t in scene.things)
    x, y = (sum(t.radius**2 * getattr(t, axis) for t in scene.things) / weight for axis in "xy")
    background = scene.background
    return beauty_of(background.kind, background.saturation, (x, y))


def beauty_of(background: str, saturation: float, middle: tuple[float, float]) -> float:
    """Returns `beauty` of a kind of background, its saturation, and the middle of the objects, in shares."""
    imbalance = min(1.0, math.dist(middle, (0.5, 0.5)) / 0.3)
    low, high = scenes.SATURATIONS
    colour = (saturation - low) / (high - low)
    charm = BACKGROUND_CHARM[background]
    return PLAIN_AESTHETICS + charm + COLOUR_CHARM * colour - IMBALANCE_COST * imbalance


def clicks(region: np.ndarray, rng: np.random.Generator) -> list[ratings.Point]:
    """Draws a rater's clicks on a region; at least one unless the region is empty.

    Args:
      region: bool [height, width].
      rng: random numbers.

    Returns:
      (x, y) in pixels; x to the right, y down.
    """
    if not region.any():
        return []
    height, width = region.shape
    radius = feedback.POINT_RADIUS * height
    spacing = CLICK_SPACING * radius
    start_x, start_y = rng.uniform(0, spacing, 2)
    xs, ys = np.arange(start_x, width, spacing), np.arange(start_y, height, spacing)
    rows, columns = np.nonzero(region[np.ix_(ys.astype(int), xs.astype(int))])
    points = np.stack([xs[columns], ys[rows]], axis=-1)
    points = points[rng.random(len(points)) >= P_CLICK_LEFT_OUT]
    if not len(points):
        rows, columns = np.nonzero(region)
        pick = rng.integers(len(rows))
        points = np.array([[columns[pick], rows[pick]]], float)
    points = points + rng.normal(0, CLICK_JITTER * radius, points.shape)
    points = points.clip(0, (width - 1, height - 1)).round(1)
    return [(x, y) for x, y in points.tolist()]


def rate(config: scenes.SceneConfig, name: str, truth: scenes.SceneTruth, rater_id: str) -> ratings.Rating:
    """Returns one rater's answer on the picture `name`; equal arguments give equal answers."""
    rng = scenes.make_rng(config, name, rater_id)
    size, description = config.image_size, truth.scene.description
    artifacts = [region for region in truth.artifact_regions if rng.random() >= P_MISS]
    misalignments = [m for m in truth.scene.misalignments if rng.random() >= P_MISS]
    noticed = {m.phrase_index for m in misalignments}
    wrong = [
        o.mask
        for o, thing in zip(truth.objects, truth.scene.things, strict=True)
        if o.misaligned and thing.phrase_index in noticed
    ]
    points = {}
    for kind, regions in {feedback.IMPLAUSIBILITY: artifacts, feedback.MISALIGNMENT: wrong}.items():
        found = [point for region in regions for point in clicks(region, rng)]
        if rng.random() < P_SPURIOUS_CLICK:
            found.append(tuple(rng.uniform(0, size - 1, 2).round(1).tolist()))
        points[kind] = tuple(found)
    labels = np.array(description.labels(tuple(misalignments)))
    slipped = rng.random(len(labels)) < P_LABEL_SLIP
    areas = [float(region.mean()) for region in artifacts]
    leaning = LEANINGS[rater_id]
    scores = {
        kind: int(np.clip(round(value + leaning + rng.normal(0, RATING_NOISE)), 1, 5))
        for kind, value in opinions(truth, areas, misalignments).items()
    }
    return ratings.Rating(
        image_id=name,
        prompt=description.prompt,
        rater_id=rater_id,
        width=size,
        height=size,
        points=points,
        token_labels=tuple(np.where(slipped, 1 - labels, labels).tolist()),
        ratings=scores,
        tool_version=TOOL_VERSION,
        point_radius=feedback.POINT_RADIUS,
    )


def raw_lines(config: scenes.SceneConfig, name: str, truth: scenes.SceneTruth) -> list[str]:
    """Returns the raters' answers on the picture `name` as lines of a file of raw ratings."""
    return [rate(config, name, truth, rater_id).to_json() for rater_id in LEANINGS]


@errors.command()
def main() -> None:
    """Writes raw ratings, e.g. to try `richhf_jax.datasets.consolidate` on."""
    parser = argparse.ArgumentParser(
        prog="python -m richhf_jax.datasets.raters",
        description="Writes raw ratings by simulated raters: an input for richhf_jax.datasets.consolidate.",
    )
    parser.add_argument("--out", required=True, type=pathlib.Path, metavar="RAW.jsonl")
    parser.add_argument("--num", type=int, default=100, metavar="IMAGES", help="default: 100")
    parser.add_argument("--config", choices=sorted(scenes.CONFIGS), default="default")
    options = parser.parse_args()
    if options.num < 1:
        parser.error("--num must be at least 1")
    config = scenes.CONFIGS[options.config]
    with (
        writing.explained_disk_errors(options.out),
        writing.atomic(options.out) as new,
        new.open("w", encoding="utf-8") as out,
    ):
        for index in range(options.num):
            name = scenes.filename("train", index)
            out.writelines(f"{line}\n" for line in raw_lines(config, name, scenes.truth(name, config)))


if __name__ == "__main__":
    main()
