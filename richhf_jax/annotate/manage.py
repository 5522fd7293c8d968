"""What the manager sees: how far the project is, the raters, and the images by disagreement."""

import collections
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from richhf_jax import feedback
from richhf_jax.agreement import rater_scores
from richhf_jax.annotate import transfer
from richhf_jax.annotate.project import Config
from richhf_jax.annotate.records import Answer, Item, Person
from richhf_jax.annotate.store import Store
from richhf_jax.datasets import rater_agreement, ratings

ENDINGS = ("skipped", "broken")


def overview(store: Store) -> dict[str, Any]:
    """Returns the values of the manager's page."""
    items, config = list(store.items()), store.config
    answers = [answer for answer in store.answers(finished=False) if answer.excluded is None]
    by_item: dict[str, list[Answer]] = collections.defaultdict(list)
    for answer in answers:
        if not answer.is_calibration and answer.item.gold is None:
            by_item[answer.item.id].append(answer)
    counted = {name: _finished(given) for name, given in by_item.items()}
    wanted = [item for item in items if item.gold is None]
    has_practice = config.calibration_items > 0 and len(wanted) < len(items)
    raters = [person for person in store.people() if not person.is_manager]
    scores = _scores(counted.values(), config)
    return {
        "title": config.title,
        "counts": {
            "images": len(wanted),
            "finished": sum(len(given) >= config.raters for given in counted.values()),
            "answers": sum(map(len, counted.values())),
            "wanted": config.raters * len(wanted),
        },
        "has_practice": has_practice,
        "scales": [scale.name for scale in config.scales],
        "raters": [_rater(rater, answers, scores) for rater in raters],
        "items": sorted((_item(item, by_item[item.id], config) for item in wanted), key=_worst_first),
    }


def agreement(store: Store) -> dict[str, Any]:
    """Returns the values of the page of the raters' agreement; see `RaterAgreement.summary`.

    Raises:
      errors.UserError: the project doesn't ask all that raw ratings have.
    """
    images: dict[str, list[ratings.Rating]] = collections.defaultdict(list)
    for rating in transfer.counted_ratings(store):
        images[rating.image_id].append(rating)
    found = rater_agreement.RaterAgreement()
    for given in images.values():
        found.add(given)
    suggested = [answer for answer in transfer.counted(store) if answer.first is not None]
    return {
        "title": store.config.title,
        "agreement": None,
        "suggested": len(suggested),
        "changed": sum(answer.is_changed for answer in suggested),
        **found.summary(),
    }


def item_view(store: Store, item: Item) -> dict[str, Any]:
    """Returns the values of the page of one image, with all its answers."""
    answers = [a for a in store.answers(finished=False, item_id=item.id) if a.state != "draft"]
    tokens = feedback.tokenize_prompt(item.prompt)
    counted = sum(answer.excluded is None and answer.state == "done" for answer in answers)
    return {
        "title": store.config.title,
        "item": item,
        "kinds": [kind.name for kind in store.config.kinds],
        "scales": [scale.name for scale in store.config.scales],
        "can_reassign": any(a.state in ENDINGS and a.excluded is None for a in answers),
        "radius": store.config.point_radius * item.height,
        # Disks that all raters drew are as strong as the mean of their maps.
        "share": round(1 / max(counted, 1), 3),
        "answers": [
            {
                "id": answer.id,
                "rater": answer.person.name,
                "state": answer.state,
                "reason": answer.reason,
                "excluded": answer.excluded,
                "seconds": answer.seconds,
                "ratings": answer.answer["ratings"],
                "comment": answer.answer["comment"],
                "points": {kind: answer.answer[f"{kind}_points"] for kind in feedback.HEATMAPS},
                "words": [
                    token
                    for token, label in zip(tokens, answer.answer["token_labels"], strict=True)
                    if label == feedback.MISALIGNED
                ],
            }
            for answer in answers
        ],
    }


def _finished(answers: Iterable[Answer]) -> list[Answer]:
    return [answer for answer in answers if answer.state == "done"]


def _scores(images: Iterable[list[Answer]], config: Config) -> dict[str, dict[int, dict[str, float]]]:
    """Returns scale -> rater -> `rater_scores`, of the finished answers on each image."""
    rows = [(image, answer) for image, given in enumerate(images) for answer in given]
    items = np.array([image for image, _ in rows], int)
    raters = np.array([answer.person.id for _, answer in rows], int)
    columns = {
        scale.name: np.array([answer.answer["ratings"][scale.name] for _, answer in rows])
        for scale in config.scales
    }
    return {name: rater_scores(items, raters, column) for name, column in columns.items()}


def _rater(rater: Person, answers: list[Answer], scores: Mapping[str, Mapping[int, Any]]) -> dict[str, Any]:
    own = [answer for answer in answers if answer.person.id == rater.id and not answer.is_calibration]
    done = _finished(own)
    gold = [answer.score for answer in done if answer.score is not None]
    return {
        "id": rater.id,
        "name": rater.name,
        "active": rater.active,
        "passed": rater.passed,
        "done": len(done),
        "skipped": sum(answer.state in ENDINGS for answer in own),
        "seconds": statistics.median(answer.seconds for answer in done) if done else None,
        "gold": statistics.fmean(gold) if gold else None,
        "scores": {scale: of_raters.get(rater.id) for scale, of_raters in scores.items()},
    }


def _item(item: Item, answers: list[Answer], config: Config) -> Mapping[str, Any]:
    done = _finished(answers)
    spreads = []
    for scale in config.scales:
        ratings = [answer.answer["ratings"][scale.name] for answer in done]
        if len(ratings) > 1:
            spreads.append(max(ratings) - min(ratings))
    return {
        "id": item.id,
        "prompt": item.prompt,
        "answers": len(done),
        "apart": statistics.fmean(spreads) if spreads else None,
        "reasons": [
            f"{answer.state}: {answer.reason}" if answer.reason else answer.state
            for answer in answers
            if answer.state in ENDINGS
        ],
    }


def _worst_first(view: Mapping[str, Any]) -> tuple[int, float]:
    return -len(view["reasons"]), -(view["apart"] or 0)
