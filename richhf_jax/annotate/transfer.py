"""Brings answers out of a project and into it: raw ratings, a CSV of scores, Label Studio's JSON.

Raters have pseudonyms ("rater-3") unless their names are asked for. What doesn't count stays away: drafts,
answers that were excluded, and those on gold items, which check the raters. Each answer tells whether its
rater saw a model's suggestion; `first` stands for what those raters answered before.

Label Studio gives places in percent of the image's sides, from its left and upper edge. Here a point with
whole numbers is the middle of a pixel. So pixel x of a width w is at 100 (x + 0.5) / w percent.
"""

import csv
import dataclasses
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from xml.sax import saxutils

from richhf_jax import errors, feedback
from richhf_jax.annotate import answers as forms
from richhf_jax.annotate.records import MAX_SECONDS, Answer, Item
from richhf_jax.annotate.store import Store
from richhf_jax.datasets import ratings
from richhf_jax.foreign_text import for_terminal
from richhf_jax.inputs.record import InputError, parsed_json

# Names of Label Studio's controls and objects in our labelling configuration.
_IMAGE, _RATER, _COMMENT, _SUGGESTED, _TOKEN = "image", "rater", "comment", "suggested", "token_{}"
_MISALIGNED = "misaligned"
# Digits of pixels that survive the way over percents.
_DIGITS = 6


def counted(store: Store, first: bool = False) -> Iterator[Answer]:
    """Yields the answers that count; with `first` as they were before a suggestion was seen.

    Those of which this isn't known are left out then, see `without_first`.
    """
    for answer in store.answers():
        if answer.excluded is None and answer.item.gold is None:
            if first and answer.first is not None:
                answer = dataclasses.replace(answer, answer=answer.first, shown=None)
            if not first or answer.shown is None:
                yield answer


def without_first(store: Store) -> int:
    """Returns how many answers that count followed a suggestion, while the first ones aren't known."""
    return sum(answer.shown is not None and answer.first is None for answer in counted(store))


def counted_ratings(store: Store, names: bool = False, first: bool = False) -> Iterator[ratings.Rating]:
    """Yields the answers that count as raw ratings; see `counted`.

    Raises:
      errors.UserError: the project doesn't ask all that raw ratings have, or an answer lacks a part.
    """
    for answer in _complete(store, first):
        item, rater = answer.item, answer.person.known_as(names)
        size, radius = (item.width, item.height), store.config.point_radius
        rating = forms.to_rating(answer.answer, item.id, item.prompt, size, rater, radius)
        yield dataclasses.replace(rating, suggested=answer.shown is not None)


def raw_lines(store: Store, names: bool = False, first: bool = False) -> Iterator[str]:
    """Yields lines of raw ratings, for `datasets.consolidate`; raises as `counted_ratings`."""
    for rating in counted_ratings(store, names, first):
        yield rating.to_json() + "\n"


def scores_csv(store: Store, names: bool = False, first: bool = False) -> Iterator[str]:
    """Yields the lines of a CSV: image, rater, the scales that are asked, seconds, suggested (0 or 1)."""
    scales = [scale.name for scale in store.config.scales]
    yield _csv_row(["image", "rater", *scales, "seconds", "suggested"])
    for answer in counted(store, first):
        given = [answer.answer["ratings"][scale] for scale in scales]
        seconds = f"{answer.seconds:.1f}" if answer.has_time else ""
        more = seconds, int(answer.shown is not None)
        yield _csv_row([answer.item.id, answer.person.known_as(names), *given, *more])


def _csv_row(cells: Sequence[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def _complete(store: Store, first: bool) -> Iterator[Answer]:
    """Yields the answers that count, see `counted`, after a check that they have all parts of raw ratings."""
    other = "export with --format=scores"
    if not store.config.is_complete:
        raise errors.UserError(
            f"{store.folder}: raw ratings have both kinds of points, words and four scales, and config.json"
            f" asks only some: {other}"
        )
    for answer in counted(store, first):
        # Such a part was asked later: an empty one would look like a rater who found nothing.
        if missing := forms.missing(answer.answer, store.config):
            raise errors.UserError(
                f"{for_terminal(answer.item.id)}: {answer.person.known_as(names=False)} answered it before"
                f" {', '.join(missing)} was asked: exclude the answer on the manager's page, or {other}"
            )
        yield answer


# Label Studio.


def label_studio_tasks(store: Store, names: bool = False, first: bool = False) -> list[dict[str, Any]]:
    """Returns Label Studio's tasks, one an image that has answers, each answer an annotation.

    An image's suggestion becomes a prediction, which Label Studio can show as a pre-annotation.

    Raises:
      errors.UserError: as `counted_ratings`.
    """
    longest = _longest_prompt(store)
    tasks: dict[str, dict[str, Any]] = {}
    for answer in _complete(store, first):
        item = answer.item
        tokens = feedback.tokenize_prompt(item.prompt)
        data = {_IMAGE: f"/data/local-files/?d=images/{item.file}", "id": item.id, "prompt": item.prompt}
        # Label Studio wants all data that its configuration names in each task.
        data |= {_TOKEN.format(i): tokens[i] if i < len(tokens) else "" for i in range(longest)}
        task = tasks.setdefault(item.id, {"data": data, "annotations": []} | _predictions(item))
        time = {"lead_time": answer.seconds} if answer.has_time else {}
        task["annotations"].append(time | {"result": _results(answer, answer.person.known_as(names))})
    return list(tasks.values())


def label_studio_config(store: Store) -> str:
    """Returns Label Studio's labelling configuration for the tasks, in XML."""
    labels = "".join(f'<Label value="{kind}"/>' for kind in feedback.HEATMAPS)
    lines = [
        "<View>",
        f'  <Image name="{_IMAGE}" value="${_IMAGE}" zoom="true"/>',
        '  <Text name="prompt" value="$prompt"/>',
        f'  <KeyPointLabels name="points" toName="{_IMAGE}">{labels}</KeyPointLabels>',
    ]
    for i in range(_longest_prompt(store)):
        name = _TOKEN.format(i)
        lines.append(f'  <Header value="${name}"/>')
        lines.append(f'  <Choices name="{name}" toName="{_IMAGE}"><Choice value="{_MISALIGNED}"/></Choices>')
    for scale in store.config.scales:
        lines.append(f"  <Header value={saxutils.quoteattr(scale.question)}/>")
        lines.append(f'  <Rating name="{scale.name}" toName="{_IMAGE}" maxRating="{feedback.LIKERT_MAX}"/>')
    for name in (_RATER, _COMMENT, _SUGGESTED):
        lines.append(f'  <TextArea name="{name}" toName="{_IMAGE}" placeholder="{name}"/>')
    return "\n".join([*lines, "</View>", ""])


def _longest_prompt(store: Store) -> int:
    return max((len(feedback.tokenize_prompt(item.prompt)) for item in store.items()), default=0)


def _results(answer: Answer, rater: str) -> list[dict[str, Any]]:
    """Returns the regions, choices, ratings and texts of an answer."""
    found = _regions(answer.item, answer.answer)
    suggested = "yes" if answer.shown is not None else ""
    texts = {_RATER: rater, _COMMENT: answer.answer["comment"], _SUGGESTED: suggested}
    found += [_result(name, "textarea", {"text": [text]}) for name, text in texts.items() if text]
    return _numbered(str(answer.id), found)


def _predictions(item: Item) -> dict[str, Any]:
    """Returns the field of a task that holds the item's suggestion; {} where it has none."""
    if item.suggestion is None:
        return {}
    result = _numbered("suggestion", _regions(item, item.suggestion))
    return {"predictions": [{"model_version": "suggestion", "result": result}]}


def _numbered(name: str, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"id": f"{name}-{i}", **result} for i, result in enumerate(results)]


def _regions(item: Item, given: forms.Answer | forms.Suggestion) -> list[dict[str, Any]]:
    """Returns the regions, choices and ratings of an answer, or of those parts that a suggestion has."""
    size = {"original_width": item.width, "original_height": item.height, "image_rotation": 0}
    found: list[dict[str, Any]] = []
    for kind in feedback.HEATMAPS:
        for x, y in given.get(f"{kind}_points", []):
            place = {"x": _percent(x, item.width), "y": _percent(y, item.height), "width": 1}
            found.append(_result("points", "keypointlabels", place | {"keypointlabels": [kind]}) | size)
    for i, label in enumerate(given.get("token_labels", [])):
        if label == feedback.MISALIGNED:
            found.append(_result(_TOKEN.format(i), "choices", {"choices": [_MISALIGNED]}))
    rated = given.get("ratings", {})
    return found + [
        _result(kind, "rating", {"rating": rated[kind]}) for kind in feedback.SCORES if kind in rated
    ]


def _result(name: str, kind: str, value: dict[str, Any]) -> dict[str, Any]:
    return {"from_name": name, "to_name": _IMAGE, "type": kind, "value": value}


def _percent(place: float, side: int) -> float:
    return 100 * (place + 0.5) / side


def _pixels(percent: float, side: int) -> float:
    """Returns a place in pixels, the inverse of `_percent`; the first half pixel becomes its middle."""
    return max(0.0, round(percent * side / 100 - 0.5, _DIGITS))


class _FormError(ValueError):
    """A task isn't as our configuration makes it; the message says where."""


def read_raw(path: str, lines: Iterable[bytes]) -> Iterator[tuple[ratings.Rating, str, float]]:
    """Yields (rating, comment, seconds) of a file of raw ratings.

    Raises:
      errors.UserError: a line is bad.
    """
    for number, rating in ratings.read_ratings(lines):
        if isinstance(rating, ratings.RatingError):
            raise errors.UserError(f"{path}:{number}: {rating}. Nothing imported")
        yield rating, "", 0.0


def read_label_studio(path: str, text: bytes, store: Store) -> Iterator[tuple[ratings.Rating, str, float]]:
    """Yields (rating, comment, seconds) of the annotations in an export of Label Studio's, in JSON.

    Raises:
      errors.UserError: the file isn't such an export, or an annotation isn't complete; the message says
        which.
    """
    items = {item.id: item for item in store.items()}
    try:
        tasks = parsed_json(text)
    except InputError as error:
        raise errors.UserError(f"{path}: {error}") from None
    if not isinstance(tasks, list):
        raise errors.UserError(f"{path}: no list of tasks; export as JSON (not JSON_MIN) from Label Studio")
    for number, task in enumerate(tasks, start=1):
        try:
            item = items.get(task["data"]["id"])
            if item is None:
                raise _FormError(f"the project has no image {for_terminal(str(task['data']['id']))}")
            for annotation in task["annotations"]:
                if not annotation.get("was_cancelled"):
                    yield _annotation(annotation, item, store.config.point_radius)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else "has an unknown form"
            raise errors.UserError(f"{path}: task {number} {what}. Nothing imported") from None
        except (_FormError, ratings.RatingError) as error:
            raise errors.UserError(f"{path}: task {number}: {error}. Nothing imported") from None


def _annotation(annotation: dict[str, Any], item: Item, radius: float) -> tuple[ratings.Rating, str, float]:
    seconds = annotation.get("lead_time") or 0
    if type(seconds) not in (int, float) or not 0 <= seconds <= MAX_SECONDS:
        raise _FormError(f"lead_time must be from 0 to {MAX_SECONDS:,} seconds, got {seconds!r:.20}")
    answer = forms.empty(item.prompt)
    texts = {_RATER: f"label-studio-{_completed_by(annotation)}", _COMMENT: "", _SUGGESTED: ""}
    for result in annotation["result"]:
        name, value = result["from_name"], result["value"]
        if result["type"] == "keypointlabels":
            kind = value["keypointlabels"][0]
            if kind not in feedback.HEATMAPS:
                raise _FormError(f"unknown label {for_terminal(str(kind))}")
            point = [_pixels(value["x"], item.width), _pixels(value["y"], item.height)]
            answer[f"{kind}_points"].append(point)
        elif result["type"] == "choices":
            index = name.removeprefix(_TOKEN.format(""))
            index = int(index) if index.isascii() and index.isdecimal() else -1
            if not 0 <= index < len(answer["token_labels"]):
                raise _FormError(f"{for_terminal(name)} is no token of the prompt")
            answer["token_labels"][index] = feedback.MISALIGNED
        elif result["type"] == "rating":
            answer["ratings"][name] = value["rating"]
        elif result["type"] == "textarea":
            texts[name] = "\n".join(value["text"]) if isinstance(value["text"], list) else value["text"]
    if missing := [kind for kind in feedback.SCORES if answer["ratings"][kind] is None]:
        raise _FormError(f"an annotation has no rating of {', '.join(missing)}")
    size = item.width, item.height
    rating = forms.to_rating(answer, item.id, item.prompt, size, texts[_RATER], radius)
    rating = dataclasses.replace(rating, suggested=bool(texts[_SUGGESTED]))
    return rating, texts[_COMMENT], float(seconds)


def _completed_by(annotation: dict[str, Any]) -> str:
    """Returns Label Studio's number of the annotator, which it writes alone or within an object."""
    who = annotation.get("completed_by", "unknown")
    return str(who.get("id", "unknown") if isinstance(who, dict) else who)
