"""Prompts, labels and target strings, converted exactly in both directions."""

import numpy as np
import pytest

from richhf_jax import errors, feedback

AWKWARD_PROMPTS = [
    "a yellow cat",
    "x x_0 x_0_0 X",
    "a a_0",
    "_0 __0 _0_0",
    "tab\tinside and\nlines\u00a0too",
    'commas, "quotes"; and: more...',
    "Ümlaut ümlaut ÜMLAUT_0",
]


@pytest.mark.parametrize("prompt", AWKWARD_PROMPTS)
def test_labels_to_text_and_back_is_exact(prompt):
    tokens = feedback.tokenize_prompt(prompt)
    for number in range(2 ** len(tokens)):
        labels = [number >> bit & 1 for bit in range(len(tokens))]
        text = feedback.mark_misaligned(tokens, labels)
        assert feedback.labels_from_text(tokens, text) == labels
        assert feedback.parse_labels(feedback.format_labels(labels)) == labels


def test_a_prompt_without_tokens():
    assert feedback.tokenize_prompt(" ,.;") == []
    assert feedback.mark_misaligned([], []) == ""
    assert feedback.labels_from_text([], "") == []
    assert feedback.labels_from_text([], "anything_0") == []


TOKENS = ["a", "red", "cat", "and", "a", "red", "dog"]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("", [1, 1, 1, 1, 1, 1, 1]),
        ("A Red_0 CAT and a red dog", [1, 0, 1, 1, 1, 1, 1]),  # another case
        ("a red cat and a rd_0 dog", [1, 1, 1, 1, 1, 0, 1]),  # a slip within a word
        ("a red_0 cat and a red dog dog_0 dog_0", [1, 0, 1, 1, 1, 1, 1]),  # more words than tokens
        ("a cat_0 and a red dog_0", [1, 1, 0, 1, 1, 1, 0]),  # a word left out
        ("a small red_0 cat and a red dog", [1, 0, 1, 1, 1, 1, 1]),  # a word put in
        ("a  red_0   cat and a red dog", [1, 0, 1, 1, 1, 1, 1]),  # spaces
        ("something else_0 entirely", [1, 1, 1, 1, 1, 1, 1]),
        ("a red cat_0_0 and a red dog", [1, 1, 0, 1, 1, 1, 1]),  # marked twice
    ],
)
def test_slips_of_the_model_are_tolerated(text, labels):
    assert feedback.labels_from_text(TOKENS, text) == labels


def test_a_record_with_uncertainty():
    scores = dict(zip(feedback.SCORES, (0.1, 0.2, 0.3, 0.4), strict=True))
    deviations = np.float32([0.5, 0.25, 0.125, 0.0625])
    arrays = list(scores.values()), [np.zeros((1, 1))] * 2, ()
    plain = feedback.RichFeedback.from_outputs("a", "b", *arrays)
    record = feedback.RichFeedback.from_outputs("a", "b", *arrays, deviations)
    assert list(plain.to_dict()) == ["id", "prompt", "scores", "tokens"]
    found = record.calibrated({feedback.PLAUSIBILITY: 2.0}).to_dict()
    assert found.pop("uncertainty") == dict(zip(feedback.SCORES, (1, 0.25, 0.125, 0.0625), strict=True))
    assert found == plain.to_dict() == plain.calibrated({feedback.OVERALL: 3}).to_dict()


def test_an_uncertainty_that_is_not_finite():
    with pytest.raises(errors.NotFiniteError, match="uncertainties aren't finite"):
        feedback.check_finite(np.zeros(4), np.zeros(2), np.array([1, np.nan]))
