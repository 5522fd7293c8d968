"""The raters' agreement on simulated ratings, recomputed from the file in other ways."""

import dataclasses
import itertools
import json

import krippendorff
import numpy as np
import pytest

from richhf_jax import agreement, feedback
from richhf_jax.datasets import consolidate, raters, scenes
from richhf_jax.datasets.describe import __main__ as describe
from richhf_jax.datasets.rater_agreement import RaterAgreement
from richhf_jax.datasets.ratings import Rating

CONFIG = scenes.CONFIGS["default"]


@pytest.fixture(scope="module")
def groups() -> list[list[Rating]]:
    """Ratings of 14 images; every third image lacks a rater, the last two have one rater."""
    names = [scenes.filename("train", i) for i in range(14)]
    found = []
    for i, name in enumerate(names):
        truth = scenes.truth(name, CONFIG)
        group = [raters.rate(CONFIG, name, truth, rater) for rater in raters.LEANINGS]
        found.append(group[:1] if i >= 12 else group[i % 2 :] if i % 3 == 0 else group)
    return found


@pytest.fixture(scope="module")
def summary(groups) -> dict:
    collected = RaterAgreement()
    for group in groups:
        collected.add(group)
    collected.add([])
    return collected.summary()


def test_scores(groups, summary):
    for kind in feedback.SCORES:
        matrix = np.full((3, len(groups)), np.nan)
        for i, group in enumerate(groups):
            for rating in group:
                matrix[list(raters.LEANINGS).index(rating.rater_id), i] = rating.ratings[kind]
        part = summary["agreement"][kind]
        assert part["krippendorff_alpha"] == pytest.approx(
            krippendorff.alpha(matrix, level_of_measurement="ordinal")
        )
        assert part["count"] == 12
        assert 0 < part["icc2k"] < 1
        assert part["k"] == pytest.approx(len(groups) / np.sum(1 / np.sum(~np.isnan(matrix), axis=0)))
        for row, rater in enumerate(raters.LEANINGS):
            others = np.delete(matrix, row, axis=0)
            both = ~np.isnan(matrix[row]) & ~np.isnan(others).all(0)
            difference = matrix[row, both] - np.nanmean(others[:, both], axis=0)
            assert summary["rater_scores"][rater][kind] == {
                "count": both.sum(),
                "bias": pytest.approx(difference.mean()),
                "spread": pytest.approx(difference.std()),
            }


def test_prompts_without_words(groups):
    collected = RaterAgreement()
    for group in groups:
        collected.add([dataclasses.replace(rating, prompt="!", token_labels=()) for rating in group])
    summary = collected.summary()
    assert summary["word_agreement"] == {"words": 0, "fleiss_kappa": None}
    assert summary["agreement"].keys() == set(feedback.SCORES)


def test_words_and_points(groups, summary):
    groups = [group for group in groups if len(group) > 1]
    votes = [np.transpose([rating.token_labels for rating in group]) for group in groups]
    assert summary["word_agreement"]["words"] == sum(map(len, votes))
    misaligned = np.concatenate([np.sum(labels == feedback.MISALIGNED, axis=1) for labels in votes])
    voters = np.repeat(list(map(len, groups)), list(map(len, votes)))
    assert summary["word_agreement"]["fleiss_kappa"] == agreement.fleiss_kappa(misaligned, voters)
    assert 0.2 < summary["word_agreement"]["fleiss_kappa"] < 1
    for kind in feedback.HEATMAPS:
        # The scenes have the side of the compared maps, so that nothing is stretched.
        maps = [
            (i, consolidate.point_heatmap(r.points[kind], r.height, r.width, r.height / 20))
            for i, group in enumerate(groups)
            for r in group
        ]
        distances = {True: [], False: []}
        for (i, one), (j, other) in itertools.combinations(maps, 2):
            distances[i == j].append(np.mean(one != other))
        within, between = np.mean(distances[True]), np.mean(distances[False])
        assert summary["point_agreement"][kind] == {
            "items": len(groups),
            "within": pytest.approx(within),
            "between": pytest.approx(between),
            "sigma": pytest.approx(1 - within / between),
        }
        assert 0.2 < 1 - within / between < 1


def test_one_rater_an_image_has_no_agreement(groups):
    collected = RaterAgreement()
    assert collected.summary() == {}
    for group in groups:
        collected.add(group[:1])
    assert collected.summary() == {"raters": {"1": len(groups)}}


def test_the_command_prints_what_is_in_the_json(groups, summary, tmp_path, capsys):
    raw, page = tmp_path / "raw.jsonl", tmp_path / "page.html"
    raw.write_text("".join(f"{rating.to_json()}\n" for group in groups for rating in group))
    describe.main([f"--raw={raw}", f"--json={tmp_path / 'figures.json'}", f"--html={page}"])
    printed, content = capsys.readouterr().out, json.loads((tmp_path / "figures.json").read_text())
    assert {name: content[name] for name in summary} == summary
    figures = [summary["word_agreement"]["fleiss_kappa"]]
    figures += [
        part[key] for part in summary["agreement"].values() for key in ("krippendorff_alpha", "icc2k")
    ]
    figures += [part["sigma"] for part in summary["point_agreement"].values()]
    for figure in figures:
        assert f" {figure:.3f}" in printed
        assert f"{figure:.3f}" in page.read_text()
    bias = summary["rater_scores"]["rater-2"]["overall"]["bias"]
    assert f"{bias:+.2f} ± " in printed
    assert f"{bias:+.2f} ± " in page.read_text()
