"""The table of words: the weights of exchanges, and mistakes in a table."""

import gin
import numpy as np
import pytest

from richhf_jax import errors, word_table
from richhf_jax.datasets import caption_words
from tasks import synthetic


@pytest.mark.parametrize("frequencies", [(0.17, 0.15, 0.08), (1, 1), (3, 2), (6, 1, 1), (5, 4, 3, 2, 1)])
def test_exchanges_keep_frequencies(frequencies):
    shares = np.array(frequencies) / sum(frequencies)
    weights, accepted = word_table.exchange_weights(frequencies)
    chances = np.where(np.eye(len(shares)), 0, weights) / (weights.sum() - weights)[:, None]
    flows = shares[:, None] * accepted[:, None] * chances
    np.testing.assert_allclose(flows, flows.T, atol=1e-9)
    # Only a word that is more frequent than the others together isn't always exchanged.
    assert ((accepted < 1) == (shares > 0.5)).all()


def test_a_class_has_no_word_of_another():
    for table in caption_words.TABLES.values():
        words = word_table.Words(**table)
        forms = [*words.entries.singular, *words.entries.plural[words.entries.role == word_table.NOUN]]
        assert len(set(forms)) == len(forms)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"words": ("red",), "role": "modifier"}, "'x'.*two words or more"),
        ({"words": {"red": 1, "blue": 0}, "role": "modifier"}, "'x'.*above 0"),
        ({"words": ("red", "blue"), "role": "colour"}, "'x'.*role must be noun"),
        ({"words": ("cat", "dog"), "role": "noun"}, "'x'.*'cat' must have the form 'star/stars'"),
        ({"words": ("red", "light blue"), "role": "modifier"}, "'x'.*'light blue' must have the form 'red'"),
        ({"words": ("red", "red"), "role": "modifier", "role_": 1}, "'x'.*role_"),
        ({"words": ("two", "three"), "role": "number"}, "'x'.*a value for each word"),
        ({"words": ("red", "blue"), "role": "modifier", "weight": -1}, "weight must be a number, 0 or more"),
        ({"words": ("cat/cats", "cats/dogs"), "role": "noun"}, "'cats' twice"),
    ],
)
def test_a_bad_table_is_named(fields, message):
    with pytest.raises(errors.UserError, match=message):
        word_table.Words({"x": fields}).entries  # noqa: B018


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"words": 5, "role": "modifier"}, "class 'x' .*: words must be a list"),
        ({"words": "red", "role": "modifier"}, "class 'x' .*: words must be a list"),
        ({"words": [1, 2], "role": "modifier"}, "class 'x' .*: words must be a list of texts"),
        ({"words": ["red", "red", "blue"], "role": "modifier"}, "class 'x' .* has a word twice"),
        ({"words": {"red": "x", "blue": 2}, "role": "modifier"}, "class 'x' .*: red must be a number"),
        ({"words": ["red", "blue"], "role": "modifier", "weight": "x"}, "weight must be a number"),
        ({"words": ["red", "blue"], "role": "modifier", "once": "no"}, "once must be True or False"),
        ({"words": ["red", "blue"], "role": "modifier", "unless": "his"}, "unless must be a list"),
        ({"words": ["two", "three"], "role": "number", "values": [-1, 2]}, "values must be numbers"),
        (5, "class 'x'"),
    ],
)
def test_a_class_of_other_types_is_named(fields, message):
    with pytest.raises(errors.UserError, match=message):
        word_table.Words({"x": fields}).entries  # noqa: B018


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": {}},
        {"classes": None},
        {"compounds": "hot dog"},
        {"compounds": ["Hot dog"]},
        {"impossible": [4]},
        {"unless": [""]},
        {"swap_weight": "x"},
        {"phrase_weight": -1},
        {"most_objects": 2.5},
    ],
)
def test_a_field_of_another_type_is_named(changes):
    with pytest.raises(errors.UserError, match=f"table of words: {next(iter(changes))} must be"):
        word_table.Words(**{**caption_words.SYNTHETIC, **changes})


def test_a_field_that_the_table_lacks_is_named():
    gin.bind_parameter("tasks.synthetic.synthetic_words.clases", {})
    with pytest.raises(errors.UserError, match="no field 'clases', only classes, swap_weight"):
        synthetic.synthetic_words()
