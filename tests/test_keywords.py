"""Any prompt passes the shipped vocabulary and the constrained decoder, here with random logits."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio

from richhf_jax import decoding, errors, feedback, keywords
from tasks import vocabulary

PIECES = {"a": [5], "yellow": [6, 7], "cat": [8], "\u200b": [], "_0": [3]}


def encode(text):
    """Encodes with one or two pieces a word and one for the suffix; drops zero-width spaces."""
    word = text.removesuffix(feedback.MISALIGNED_SUFFIX)
    return PIECES[word] + PIECES["_0"] * (word != text)


def test_the_prompt_of_the_docstring():
    found = keywords.keyword_pieces("a yellow, cat", encode, length=6)
    assert {array.dtype for array in found} == {np.dtype(np.int32)}
    np.testing.assert_array_equal(found.pieces, [5, 6, 7, 8, 0, 0])
    np.testing.assert_array_equal(found.words, [1, 2, 2, 3, 0, 0])
    np.testing.assert_array_equal(found.numbers, [1, 2, 3])


def test_a_token_that_has_no_pieces_is_not_decided():
    found = keywords.keyword_pieces("a \u200b cat", encode, length=4)
    np.testing.assert_array_equal(found.words, [1, 2, 0, 0])
    np.testing.assert_array_equal(found.numbers, [1, 0, 2])


def test_a_prompt_longer_than_the_decoder_is_cut():
    found = keywords.keyword_pieces("a yellow cat a cat", encode, length=2)
    np.testing.assert_array_equal(found.pieces, [5, 6])
    np.testing.assert_array_equal(found.words, [1, 2])
    np.testing.assert_array_equal(found.numbers, [1, 2, 0, 0, 0])


@pytest.mark.parametrize("prompt", ["", ' ,.?!":; '])
def test_a_prompt_without_words(prompt):
    found = keywords.keyword_pieces(prompt, encode, length=2)
    assert not found.pieces.any()
    assert not found.words.any()
    assert keywords.tokens(prompt, found, np.full(2, np.nan), np.zeros(2, bool)) == ()


def test_features_of_a_batch_with_a_row_to_spare():
    prompts = [keywords.keyword_pieces(prompt, encode, 3) for prompt in ("a cat", "yellow")]
    found = keywords.features(prompts, rows=3, length=3, suffix=[3, 4])
    np.testing.assert_array_equal(found["keyword_pieces"], [[[5, 8, 0]], [[6, 7, 0]], [[0, 0, 0]]])
    np.testing.assert_array_equal(found["keyword_words"], [[[1, 2, 0]], [[1, 1, 0]], [[0, 0, 0]]])
    np.testing.assert_array_equal(found["keyword_suffix"], [[3, 4]] * 3)


def test_tokens_have_labels_and_probabilities():
    prompt = "a yellow \u200b yellow a"
    words = keywords.keyword_pieces(prompt, encode, length=6)
    # The last word was never reached; a "yellow" is marked because a lower threshold was asked for.
    probability = np.array([1, 0.25, 0, np.nan, np.nan, np.nan], np.float32)
    misaligned = np.isin(np.arange(6), [0, 1])
    found = keywords.tokens(prompt, words, probability, misaligned)
    assert [(token.text, token.misaligned) for token in found] == [
        *(("a", True), ("yellow", True), ("\u200b", False), ("yellow", False), ("a", False))
    ]
    assert [token.probability for token in found] == [1.0, 0.25, None, 0.0, None]


@pytest.mark.parametrize(("length", "decided"), [(2, False), (3, True)])
def test_a_first_word_without_a_decision_is_an_error_where_there_is_room_for_one(length, decided):
    words = keywords.keyword_pieces("yellow", encode, length)  # Two pieces, then the decision.
    arguments = "yellow", words, np.full(length, np.nan, np.float32), np.zeros(length, bool)
    if decided:
        with pytest.raises(errors.NotFiniteError, match="keyword probabilities aren't finite"):
            keywords.tokens(*arguments)
    else:
        assert keywords.tokens(*arguments) == (feedback.Token("yellow", False),)


@pytest.mark.parametrize("marked", [[9, 3], [5]])
def test_a_vocabulary_that_cannot_write_the_suffix(marked):
    with pytest.raises(errors.UserError, match=r"writes 'a' as \[5\], but 'a_0' as .* another vocabulary"):
        keywords.suffix_pieces({"a": [5], "a_0": marked}.get)


WORDS = [
    *("a", "yellow", "Cat", "don't", "(round)", "x_0", "_0", "_0_0", "two_", "_", "0", "café", "ﬁ", "~"),
    *(
        "😀",
        "👩‍👩‍👧",
        "猫",
        "黄色い猫",
        "고양이",
        "gelbe",
        "Straße",
        "\u200b",
        "\u00a0",
        "a\tb",
        "▁",
        "<unk>",
        "</s>",
    ),
]
# Words that `feedback.labels_from_text`, which sees only the text, can't read: they end as if they were
# marked, or have spaces of other kinds in them.
UNCLEAR = {"x_0", "_0", "_0_0", "a\tb", "\u00a0"}
SEPARATORS = [" ", " ", " ", ", ", ". ", '"', "!? ", ":", ";", "   "]


def random_prompts(rng, count, words):
    """Makes `count` prompts of at most `words` words, the first of exactly as many."""
    sizes = rng.integers(0, words + 1, count)
    sizes[0] = words
    return [
        str(rng.choice(SEPARATORS))
        + "".join(str(rng.choice(WORDS)) + str(rng.choice(SEPARATORS)) for _ in range(n))
        for n in sizes
    ]


def decode(rng, texts, vocab, suffix, length):
    """Constrained decoding by a model of random logits, which depend on all that was written.

    Returns tokens and, by number of the word, the probability and the decision.
    """
    table = jnp.asarray(rng.normal(size=(499, vocab)), jnp.float32)

    def tokens_to_logits(state):
        past = (state.cache * 31 + state.cur_token[:, 0] + 1) % 499
        return table[past], past

    batch = keywords.features(texts, len(texts), length, suffix)
    pieces, words = (batch[f"keyword_{name}"][:, 0] for name in ("pieces", "words"))

    @jax.jit
    def run():
        text, decided_at = decoding.optional_suffixes(pieces, words, batch["keyword_suffix"])
        inputs, seeds = jnp.zeros(pieces.shape, jnp.int32), jnp.arange(len(texts))
        tokens, _, log_odds, written = decoding.constrained_decode(inputs, seeds, tokens_to_logits, text)
        log_odds, written = (jnp.take_along_axis(x, decided_at, axis=1) for x in (log_odds, written))
        return tokens, jax.nn.sigmoid(log_odds), written

    return map(np.asarray, run())


def spelt(text):
    """Normalises a text as the shipped vocabulary does: tab and U+2581 are spaces, several become one."""
    return " ".join(re.split("[ \t▁]+", text)).strip(" ")


# 1,000 prompts, the longest of 300 words; a word takes up to 20 pieces.
@pytest.mark.parametrize(("count", "words", "length"), [(990, 12, 240), (10, 300, 6000)])
def test_every_answer_maps_back_to_one_label_a_token(rng, count, words, length):
    vocab = vocabulary.get_vocabulary()
    prompts = random_prompts(rng, count, words)
    texts = [keywords.keyword_pieces(prompt, vocab.encode, length) for prompt in prompts]
    suffix = keywords.suffix_pieces(vocab.encode)
    outputs = decode(rng, texts, vocab.vocab_size, suffix, length)
    shares = []
    for prompt, text, ids, *decisions in zip(prompts, texts, *outputs, strict=True):
        found = keywords.tokens(prompt, text, *decisions)
        words_of_prompt = feedback.tokenize_prompt(prompt)
        assert [token.text for token in found] == words_of_prompt
        labels = [feedback.MISALIGNED if token.misaligned else feedback.ALIGNED for token in found]
        answer = feedback.mark_misaligned(words_of_prompt, labels)
        assert vocab.decode(ids.tolist()) == spelt(answer)
        if "▁" not in prompt:  # Among other words it is a piece, by itself none.
            # What a target of the training with these labels would be, EOS included.
            target = [*vocab.encode(answer), vocab.eos_id]
            np.testing.assert_array_equal(ids, target + [0] * (length - len(target)))
        for token in found:
            if token.text == "▁":  # A space: there is nothing to mark.
                assert (token.misaligned, token.probability) == (False, None)
            else:
                assert token.misaligned == (token.probability > 0.5)
        if not UNCLEAR & set(words_of_prompt):
            assert feedback.labels_from_text(words_of_prompt, answer) == labels
        shares += labels
    assert 0.4 < np.mean(shares) < 0.6
    assert max(len(feedback.tokenize_prompt(prompt)) for prompt in prompts) == words


def test_a_vocabulary_that_knows_few_characters_decides_every_word(rng):
    model = pathlib.Path(seqio.__file__).parent / "test_data/sentencepiece/sentencepiece.model"
    vocab = seqio.SentencePieceVocabulary(str(model), extra_ids=0)
    # Its suffix is one unknown piece, which natural texts join to an unknown character before it.
    assert vocab.encode("猫") == vocab.encode("猫_0")
    prompts = random_prompts(rng, 50, 12)
    texts = [keywords.keyword_pieces(prompt, vocab.encode, 100) for prompt in prompts]
    _, *decisions = decode(rng, texts, vocab.vocab_size, keywords.suffix_pieces(vocab.encode), 100)
    for prompt, text, *row in zip(prompts, texts, *decisions, strict=True):
        found = keywords.tokens(prompt, text, *row)
        for token in found:
            assert (token.probability is None) == (not vocab.encode(token.text))
