"""A SavedModel encodes prompts to the same ids as the predictor, which uses the sentencepiece package."""

import dataclasses
import io
import pathlib
import random

import numpy as np
import pytest
import sentencepiece
import tensorflow as tf

from richhf_jax import feedback, model_description
from richhf_jax.export import saved_model
from tasks import vocabulary

# One character for each special case of SentencePiece, and neighbours to combine them with.
# fmt: off
FRAGMENTS = [
    "a", "the", "cat", "star", "ellow", "plausibility", "score", "_0", "_", "<x>", "star_0", "▁", "▁▁", "!",
    "é", "ﬁ", "ﬃx", "ＡＢＣ１２", "…", "½", "™", "¨", "´", ",", "-", "123", "Straße", "naïve", "привет", "😀",
    "<pad>", "</s>", "<unk>", "<0x41>", "東京", "カ", "ｶﾞ", "가", "\u1100\u1161\u11a8", "𝐀𝒷", "👩\u200d👧",
    " ", "  ", "\t", "\r\n", "\xa0", "\u2028", "\u200b", " \1 ", "\ufeff", "e\u0301", "\ufffd",
    "\U0010ffff",
]
WORDS = [
    "cat", "dogs", "yellow", "star", "café", "naïve", "Straße", "red", "running", "jumper", "über", "東京",
]
PROMPTS = [
    "", " ", "▁", " ▁ ", "\u200b", "\t", "x" * 300, "猫" * 50, "a red cat " * 30, "🦊 猫 on a\tred  star \n",
]
# fmt: on


def train(**options) -> bytes:
    rng = random.Random(1)
    sentences = [" ".join(rng.choices(WORDS, k=rng.randint(3, 9))) + rng.choice(".!, ") for _ in range(400)]
    model = io.BytesIO()
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        **{
            "vocab_size": 120,
            "hard_vocab_limit": False,
            "num_threads": 1,
            "minloglevel": 2,
            **ids,
            **options,
        },
    )
    return model.getvalue()


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    letters = "abcdefghijklmnoprstuvwyzACE"

    def character() -> str:
        low, high = rng.choice([(32, 126), (1, 0x2FFF), (1, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x1FFFF)])
        return chr(rng.randint(low, high))

    def text() -> str:
        kind = rng.random()
        if kind < 0.5:
            return "".join(rng.choices(FRAGMENTS, k=rng.randint(0, 12)))
        if kind < 0.75:
            return "".join(character() for _ in range(rng.randint(0, 20)))
        return " ".join("".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(rng.randint(1, 12)))

    return [text() for _ in range(count)]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(None, id="shipped"),
        # T5's kind: no bytes for unknown characters, NFKC.
        pytest.param({"character_coverage": 0.98}, id="unknown"),
        # Has nothing between the unknown characters of one text and the next.
        pytest.param({"add_dummy_prefix": False, "normalization_rule_name": "identity"}, id="no prefix"),
        # Has symbols within words, across characters that are normalised, and with a space before them.
        pytest.param(
            {
                "normalization_rule_name": "nfkc_cf",
                "byte_fallback": True,
                "vocab_size": 400,
                "user_defined_symbols": ["_0", "ﬁx", "▁<x>", "star_0", "e"],
            },
            id="symbols",
        ),
    ],
)
def description(request, make_model_dir) -> model_description.ModelDescription:
    """Describes a model with this vocabulary."""
    model = train(**request.param) if request.param else pathlib.Path(vocabulary.SMALL_MODEL).read_bytes()
    read = model_description.read(make_model_dir("augmented_prompt"))
    return dataclasses.replace(read, vocabulary=model)


class _Served(tf.Module):
    """Saves the part of a SavedModel that reads prompts."""

    def __init__(self, description):
        super().__init__()
        reader = saved_model.PromptReader(description)
        self.resources = reader.resources
        signature = [tf.TensorSpec([None], tf.string)]
        self.encode = tf.function(
            lambda prompts: (reader.tokens(prompts), reader.words(prompts)[2:]), input_signature=signature
        )


def test_ids_are_those_of_sentencepiece(description, tmp_path):
    tf.saved_model.save(_Served(description), str(tmp_path / "saved"))
    served = tf.saved_model.load(str(tmp_path / "saved"))
    prompts = [*PROMPTS, *random_texts(1000)]
    tokens, (pieces, piece_numbers) = served.encode(tf.constant(prompts))
    encoder = description.encoder
    tasks = feedback.task_prompts(description.network.variant, "")
    most_cut = 0
    for i, prompt in enumerate(prompts):
        expected, cut = encoder.encode([task + prompt for task in tasks], 24)
        np.testing.assert_array_equal(tokens[i], expected, err_msg=repr(prompt))
        words = encoder.keyword_pieces(prompt, 24)
        np.testing.assert_array_equal(pieces[i], words.pieces, err_msg=repr(prompt))
        np.testing.assert_array_equal(piece_numbers[i], words.words, err_msg=repr(prompt))
        most_cut = max(most_cut, *cut)
    assert most_cut > 10
    assert served.encode(tf.constant([], tf.string))[0].shape == (0, len(tasks), 24)
