"""Writes images with their predictions as the cards of an HTML page, to sort, filter and search.

A page holds its style and script itself and forbids the browser every network request. Its images are in the
page, too, or in its folder. `templates/predictions.html` is a page with nothing but cards;
`templates/report.html` has them below the figures of an evaluation. Both share frame, cards and style.
"""

import base64
import dataclasses
import io
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from etils import epath
from PIL import Image

from richhf_jax import feedback, writing
from richhf_jax.feedback import RichFeedback
from richhf_jax.pages import overlay

# Largest sides of pictures, in pixels; larger ones are shrunk. No screen shows them larger in the gallery,
# and a page should open at once. Heatmaps are smooth: they need fewer pixels, and their noise takes space.
MAX_IMAGE_SIDE = 256
MAX_HEATMAP_SIDE = 128

# Up to this number of images, a gallery's pictures should be `data_uri`s: the page is then one file to send
# around, of some tens of megabytes at most. Above it, they should be files beside the page: a browser then
# reads only those in sight. The page takes both.
MAX_EMBEDDED = 300


@dataclasses.dataclass(frozen=True)
class GalleryItem:
    """One image with the prediction and, if it is known, the ground truth (`target`).

    Attributes:
      image: uint8 [height, width, 3].
      target: the ground truth; None where it is unknown.
      prediction: the model's feedback.
    """

    image: np.ndarray
    target: RichFeedback | None
    prediction: RichFeedback


# kind of heatmap -> its peak in [0, 1], and the URI of its transparent picture, None where it is empty.
Heatmaps = Mapping[str, tuple[float, str | None]]


@dataclasses.dataclass(frozen=True)
class Card:
    """One image of a gallery with its prediction, all pictures as URIs.

    Attributes:
      record: a line of predictions.jsonl (`RichFeedback.to_dict`): "id", "prompt", and where there are some,
        "scores", "uncertainty" and "tokens".
      size: the image's width and height in pixels, which may be more than the shown picture's.
      image: a `data_uri`, or a path relative to the page's folder, percent-encoded.
      heatmaps: the pictures that lie over the image, with URIs of the same two forms.
    """

    record: Mapping[str, Any]
    size: tuple[int, int]
    image: str
    heatmaps: Heatmaps


def write_gallery(
    path: epath.PathLike,
    title: str,
    cards: Iterable[Card],
    details: Mapping[str, Any],
    score_range: tuple[float, float] = (0, 1),
) -> None:
    """Writes a page of predictions: the report's gallery, without ground truth.

    Args:
      path: the HTML file to write; the cards' relative URIs are relative to its folder.
      title: the page's headline.
      cards: the images to show, in input order.
      details: facts about the predictions, in a line below the title.
      score_range: the model's `feedback.Outputs.score_range`.
    """
    views = [_view(card) for card in cards]
    page = render("predictions.html", views, score_range, title=title, details=details)
    writing.write(path, page)


def card_pictures(image: np.ndarray, heatmaps: Mapping[str, np.ndarray]) -> tuple[bytes, dict[str, bytes]]:
    """Makes the pictures of a card, of at most `MAX_IMAGE_SIDE` and `MAX_HEATMAP_SIDE` pixels a side.

    Args:
      image: uint8 [height, width, 3].
      heatmaps: kind -> float [height, width] in [0, 1].

    Returns:
      Two values, for files or `data_uri`. The image as PNG or JPEG, whichever is smaller (a drawing becomes a
      PNG, which loses nothing). And kind -> PNG to lay over it, transparent where there is no heat; a heatmap
      without heat has no picture.
    """
    thumbnail = Image.fromarray(image)
    thumbnail.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    files = _encoded(thumbnail, "PNG"), _encoded(thumbnail, "JPEG", quality=85)
    return min(files, key=len), _heatmap_pictures(heatmaps)


def data_uri(picture: bytes) -> str:
    """Returns a URI that holds the bytes of a PNG or JPEG file."""
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(picture).decode("ascii")


def item_view(item: GalleryItem) -> dict[str, Any]:
    """Returns the template's values for an item's card, with the pictures in them.

    Raises:
      ValueError: the target and the prediction are not of the same image.
    """
    target, prediction = item.target, item.prediction
    if target and target.id != prediction.id:
        raise ValueError(f"gallery: the target is {target.id!r} but the prediction is {prediction.id!r}")
    height, width = item.image.shape[:2]
    image, _ = card_pictures(item.image, {})
    card = Card(prediction.to_dict(), (width, height), data_uri(image), _embedded(prediction.heatmaps))
    return _view(card, target)


def render(
    template: str,
    views: Sequence[Mapping[str, Any]],
    score_range: tuple[float, float] = (0, 1),
    **values: Any,
) -> str:
    """Returns a page as HTML.

    Args:
      template: name of a file in `templates/`.
      views: the cards, as `item_view` returns them.
      score_range: the model's `feedback.Outputs.score_range`; all scores' bars and filters have it.
      values: the template's other values.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("richhf_jax.pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    low, high = score_range

    def percent_of_score(score: float) -> str:
        return _percent((score - low) / (high - low))

    environment.filters |= {"percent": _percent, "percent_of_score": percent_of_score, "css_url": _css_url}
    known = {name for view in views for name in view["values"]}
    peaks = map(_peak, feedback.HEATMAPS)
    ranges = dict.fromkeys(feedback.SCORES, score_range) | dict.fromkeys(peaks, (0, 1))
    return environment.get_template(template).render(
        **values,
        cards=views,
        has_files=any(not uri.startswith("data:") for view in views for uri in view["uris"]),
        # The values to sort and filter cards by, and the least and the greatest that each can be.
        quantities={name: ends for name, ends in ranges.items() if name in known},
        colours=[f"rgb({r} {g} {b})" for r, g, b in overlay.COLOURS],
        opacity=round(100 * overlay.OPACITY),
    )


def _percent(share: float) -> str:
    """Returns a share, clipped to [0, 1], as a CSS length: 0.25 -> '25.0%'."""
    return f"{min(max(share, 0), 1):.1%}"


def _peak(kind: str) -> str:
    """Returns the name of a heatmap's peak in the controls."""
    return f"{kind} peak"


def _css_url(uri: str) -> str:
    """Escapes a URI for CSS's url("…"), which may hold neither quote, backslash nor line break."""
    return re.sub(r'["\\\n\r\f]', lambda found: f"%{ord(found[0]):02X}", uri)


# Pictures.


def _heatmap_pictures(heatmaps: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    pictures = {}
    for kind, heatmap in heatmaps.items():
        if heatmap.max() > 0:
            scale = min(1, MAX_HEATMAP_SIDE / max(heatmap.shape))
            height, width = (max(1, round(length * scale)) for length in heatmap.shape)
            # Shrinking first leaves fewer pixels to colour.
            pictures[kind] = _encoded(overlay.picture(overlay.resize(heatmap, (width, height))), "PNG")
    return pictures


def _encoded(picture: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


# Cards.


def _embedded(heatmaps: Mapping[str, np.ndarray]) -> Heatmaps:
    uris = {kind: data_uri(picture) for kind, picture in _heatmap_pictures(heatmaps).items()}
    return {kind: (float(np.clip(heat.max(), 0, 1)), uris.get(kind)) for kind, heat in heatmaps.items()}


def _view(card: Card, target: RichFeedback | None = None) -> dict[str, Any]:
    """Returns the template's values for a card; without a target, only the prediction's."""
    record = card.record
    truth = target.to_dict() if target else {}
    true_scores, scores = truth.get("scores", {}), record.get("scores", {})
    sides = [("ground truth", _embedded(target.heatmaps))] if target else []
    sides.append(("predicted", card.heatmaps))
    values = {**scores, **{_peak(kind): peak for kind, (peak, _) in card.heatmaps.items()}}
    return {
        "id": record["id"],
        "prompt": record["prompt"],
        "pieces": _pieces(record["prompt"], truth.get("tokens", []), record.get("tokens", [])),
        "image": card.image,
        "uris": [card.image, *(uri for _, uri in card.heatmaps.values() if uri)],
        "size": card.size,
        "compared": target is not None,
        "marked": "tokens" in record,
        "heatmaps": [
            (kind, [(name, *heatmaps.get(kind, (None, None))) for name, heatmaps in sides])
            for kind in feedback.HEATMAPS
            if any(kind in heatmaps for _, heatmaps in sides)
        ],
        "scores": [
            (kind, true_scores.get(kind), scores.get(kind), record.get("uncertainty", {}).get(kind))
            for kind in feedback.SCORES
            if kind in true_scores or kind in scores
        ],
        # JSON has no NaN.
        "values": {name: round(value, 4) for name, value in values.items() if not math.isnan(value)},
    }


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A word of the prompt, or the characters between two words.

    Attributes:
      text: the characters.
      truth: whether the word is misaligned.
      predicted: whether the word is predicted to be misaligned.
      probability: the model's probability of that, if there is one.
    """

    text: str
    truth: bool = False
    predicted: bool = False
    probability: float | None = None

    @property
    def marks(self) -> str:
        """The marks in words: 'misaligned', 'predicted misaligned', both, or ''."""
        marks = {"misaligned": self.truth, "predicted misaligned": self.predicted}
        return " and ".join(words for words, is_marked in marks.items() if is_marked)

    @property
    def title(self) -> str:
        """The marks, and the probability where there is one."""
        if self.probability is None:
            return self.marks
        probability = f"probability of being misaligned {self.probability:.0%}"
        return f"{self.marks}, {probability}" if self.marks else probability

    @property
    def heat(self) -> float:
        """The strength of the word's shade, 0 to 1."""
        return float(self.predicted) if self.probability is None else self.probability


def _pieces(prompt: str, truth: Sequence[Mapping], predicted: Sequence[Mapping]) -> list[_Piece]:
    """Cuts the prompt into words and the characters between them; together they are the whole prompt.

    Args:
      prompt: the prompt.
      truth: the "tokens" of the ground truth's record.
      predicted: the "tokens" of the prediction's record.

    >>> tokens = [{'text': 'a', 'misaligned': False}, {'text': 'cat', 'misaligned': True, 'probability': 0.8}]
    >>> [piece.text for piece in _pieces('a cat!', tokens, [])]
    ['a', ' ', 'cat', '!']
    >>> _pieces('a cat!', [], tokens)[2]
    _Piece(text='cat', truth=False, predicted=True, probability=0.8)
    """
    pieces, position = [], 0
    words = feedback.tokenize_prompt(prompt)
    for word, true, guess in itertools.zip_longest(words, truth[: len(words)], predicted[: len(words)]):
        start = prompt.index(word, position)
        if start > position:
            pieces.append(_Piece(prompt[position:start]))
        is_true, is_predicted = (bool(token and token["misaligned"]) for token in (true, guess))
        pieces.append(_Piece(word, is_true, is_predicted, (guess or {}).get("probability")))
        position = start + len(word)
    return [*pieces, _Piece(prompt[position:])] if position < len(prompt) else pieces
