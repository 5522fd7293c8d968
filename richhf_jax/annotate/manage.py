"""What the manager sees: how far the project is, the raters, and the images by disagreement.

Excluded answers count in no figure, and those of the practice in none of a rater's.
"""

import collections
import statistics
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from richhf_jax import feedback
from richhf_jax.agreement import rater_scores
from richhf_jax.annotate import answers as forms
from richhf_jax.annotate import transfer
from richhf_jax.annotate.project import Config
from richhf_jax.annotate.records import Answer, Item, Person
from richhf_jax.annotate.store import Store
from richhf_jax.datasets import consolidate, rater_agreement, ratings
from richhf_jax.pages import overlay

ENDINGS = ("skipped", "broken")
# Longest side of a heatmap's picture, in pixels.
_PICTURE_SIDE = 1024


def overview(store: Store, search: str = "") -> dict[str, Any]:
    """Returns the values of the manager's page, of which `status` prints some.

    Args:
      store: the project.
      search: leaves out items whose name and prompt lack this text; capitals don't matter.
    """
    store.end_first_answers()
    items, config = list(store.items()), store.config
    answers = [answer for answer in store.answers(finished=False) if answer.excluded is None]
    waiting = store.for_manager()
    waits = set(waiting)
    by_item: dict[str, list[Answer]] = collections.defaultdict(list)
    by_rater: dict[int, list[Answer]] = collections.defaultdict(list)
    for answer in answers:
        by_item[answer.item.id].append(answer)
        if not answer.is_calibration:
            by_rater[answer.person.id].append(answer)
    wanted = [item for item in items if item.gold is None]
    counted = [_finished(by_item[item.id]) for item in wanted]
    listed = [
        item
        for item in items
        if (item.gold is None or item.id in waits)
        and search.casefold() in f"{item.id}\n{item.prompt}".casefold()
    ]
    scores, drafts = _scores(counted, config), store.open_drafts()
    return {
        "title": config.title,
        "counts": {
            "images": len(wanted),
            "finished": sum(len(given) >= config.raters for given in counted),
            "answers": sum(map(len, counted)),
            # An image may have more answers than are wanted now, where `raters` was lowered.
            "wanted": sum(max(len(given), config.raters) for given in counted),
        },
        "waiting": waiting,
        "search": search,
        "has_practice": config.calibration_items > 0 and len(wanted) < len(items),
        "scales": [scale.name for scale in config.scales],
        "raters": [
            _rater(one, by_rater[one.id], drafts[one.id], scores)
            for one in store.people()
            if not one.is_manager
        ],
        "items": sorted(
            (_item(item, by_item[item.id], config, item.id in waits) for item in listed), key=_worst_first
        ),
    }


def agreement(store: Store) -> dict[str, Any]:
    """Returns the values of the page of the raters' agreement; see `RaterAgreement.summary`.

    Only parts that are asked have figures. Answers that lack one, because it was asked later, are left out.
    """
    config, left_out, suggested, changed = store.config, 0, 0, 0
    images: dict[str, list[ratings.Rating]] = collections.defaultdict(list)
    for answer in transfer.counted(store):
        suggested += answer.first is not None
        changed += answer.is_changed
        if forms.missing(answer.answer, config):
            left_out += 1
        else:
            images[answer.item.id].append(_rating(answer, config))
    collected = rater_agreement.RaterAgreement()
    for given in images.values():
        collected.add(given)
    found, asked = collected.summary(), {part.name for part in (*config.kinds, *config.scales)}
    for name in ("agreement", "point_agreement"):
        found[name] = {kind: part for kind, part in found.get(name, {}).items() if kind in asked}
    if not config.words:
        found.pop("word_agreement", None)
    return {
        "title": config.title,
        "suggested": suggested,
        "changed": changed,
        "has_shared": max(map(len, images.values()), default=0) > 1,
        "left_out": left_out,
        "agreement": found["agreement"],
        "word_agreement": found.get("word_agreement"),
        "point_agreement": found["point_agreement"],
    }


def _rating(answer: Answer, config: Config) -> ratings.Rating:
    """Returns an answer as a line of raw ratings, in which scales that aren't asked have the lowest value."""
    item = answer.item
    given = {kind: value or feedback.LIKERT_MIN for kind, value in answer.answer["ratings"].items()}
    size, rater = (item.width, item.height), answer.person.known_as(names=False)
    filled = answer.answer | {"ratings": given}
    return forms.to_rating(filled, item.id, item.prompt, size, rater, config.point_radius)


def item_view(store: Store, item: Item) -> dict[str, Any]:
    """Returns the values of the page of one image, with all its answers."""
    config = store.config
    answers = [a for a in store.answers(finished=False, item_id=item.id) if a.state != "draft"]
    return {
        "title": config.title,
        "item": item,
        "path": path(item.id),
        "kinds": [kind.name for kind in config.kinds],
        "scales": [scale.name for scale in config.scales],
        "was_skipped": any(a.state in ENDINGS and a.excluded is None for a in answers),
        "candidates": store.candidates(item.id),
        "radius": config.point_radius * item.height,
        "marked": {kind.name: any(_points(answers, kind.name, config)) for kind in config.kinds},
        "answers": [{"number": i, **_answer(answer)} for i, answer in enumerate(answers, 1)],
    }


def path(item_id: str) -> str:
    """Returns an item's name as one part of an address."""
    return urllib.parse.quote(item_id, safe="")


def _answer(answer: Answer) -> dict[str, Any]:
    given = answer.answer
    tokens = feedback.tokenize_prompt(answer.item.prompt)
    return {
        "id": answer.id,
        "rater": answer.person.name,
        "state": answer.state,
        "is_done": answer.state == "done",
        "counts": answer.state == "done" and answer.excluded is None,
        "is_calibration": answer.is_calibration,
        "reason": answer.reason,
        "excluded": answer.excluded,
        "seconds": answer.seconds if answer.has_time else None,
        "ratings": given["ratings"],
        "comment": given["comment"],
        "points": {kind: given[f"{kind}_points"] for kind in feedback.HEATMAPS},
        "words": [
            token
            for token, label in zip(tokens, given["token_labels"], strict=True)
            if label == feedback.MISALIGNED
        ],
    }


def heatmap(store: Store, item: Item, kind: str) -> bytes | None:
    """Draws an image's consolidated heatmap as the pages do: a transparent PNG of the image's shape.

    Returns:
      None where the answers that count mark nothing of this kind.
    """
    points = _points(store.answers(item_id=item.id), kind, store.config)
    if not any(points):
        return None
    mean = consolidate.consolidated_heatmap(
        points, item.height, item.width, store.config.point_radius * item.height
    )
    scale = min(1, _PICTURE_SIDE / max(item.width, item.height))
    size = max(1, round(scale * item.width)), max(1, round(scale * item.height))
    return overlay.png(overlay.picture(overlay.resize(mean / np.float32(255), size)))


def _points(answers: Iterable[Answer], kind: str, config: Config) -> list[Sequence[ratings.Point]]:
    """Returns the points of one kind of each answer that counts, without those that weren't asked for it."""
    return [
        answer.answer[f"{kind}_points"]
        for answer in _finished(answers)
        if answer.excluded is None and kind not in forms.missing(answer.answer, config)
    ]


def _finished(answers: Iterable[Answer]) -> list[Answer]:
    return [answer for answer in answers if answer.state == "done"]


def _scores(images: Iterable[list[Answer]], config: Config) -> dict[str, dict[int, dict[str, float]]]:
    """Returns scale -> rater -> `rater_scores`, of the finished answers on each image."""
    found = {}
    for scale in config.scales:
        # An answer has no value on a scale that was asked later.
        rows = [
            (image, answer.person.id, value)
            for image, given in enumerate(images)
            for answer in given
            if (value := answer.answer["ratings"][scale.name]) is not None
        ]
        found[scale.name] = rater_scores(*np.array(rows, int).reshape(-1, 3).T)
    return found


def _rater(
    rater: Person, own: list[Answer], drafts: int, scores: Mapping[str, Mapping[int, Any]]
) -> dict[str, Any]:
    done = _finished(own)
    times = [answer.seconds for answer in done if answer.has_time]
    # Who skips an image gives no answer that could be wrong.
    gold = [answer.score for answer in done if answer.score is not None]
    return {
        "id": rater.id,
        "name": rater.name,
        "active": rater.active,
        "passed": rater.passed,
        "done": len(done),
        "open": drafts,
        "skipped": sum(answer.state in ENDINGS for answer in own),
        "seconds": statistics.median(times) if times else None,
        "gold": statistics.fmean(gold) if gold else None,
        "scores": {scale: of_raters.get(rater.id) for scale, of_raters in scores.items()},
    }


def _item(item: Item, answers: list[Answer], config: Config, waits: bool) -> Mapping[str, Any]:
    done = _finished(answers)
    spreads = []
    for scale in config.scales:
        given = [a.answer["ratings"][scale.name] for a in done]
        known = [value for value in given if value is not None]
        if len(known) > 1:
            spreads.append(max(known) - min(known))
    return {
        "id": item.id,
        "path": path(item.id),
        "prompt": item.prompt,
        "is_gold": item.gold is not None,
        "waits": waits,
        "answers": len(done),
        "apart": statistics.fmean(spreads) if spreads else None,
        "reasons": [
            f"{answer.state}: {answer.reason}" if answer.reason else answer.state
            for answer in answers
            if answer.state in ENDINGS
        ],
    }


def _worst_first(view: Mapping[str, Any]) -> tuple[bool, int, float]:
    return not view["waits"], -len(view["reasons"]), -(view["apart"] or 0)
