"""Makes true captions wrong in known words, in TensorFlow operations: labels for misalignment without raters.

    'A red star, and one circle.'   a word        -> 'A blue star, and one circle.'   labels 1 0 1 1 1 1
                                    a number      -> 'A red star, and two circles.'          1 1 1 1 0 1
                                    two nouns     -> 'A red circle, and one star.'           1 1 0 1 1 0
                                    a phrase      -> 'A blue ring, and one circle.'          1 0 0 1 1 1

The words come from a table of classes whose words exclude each other (`word_table.Words`). Capitals,
punctuation and the number of words stay. Articles and plurals follow the words, and aren't wrong.

A caption's text shall not tell whether it is true. So each exchange is as likely as its reverse: if the
captions' words of a class are drawn independently with the table's frequencies, then true and corrupted
captions are equally distributed. A caption in which nothing can be exchanged stays true and has no alignment.

The phrase of a noun is the noun and the numbers and modifiers right before it. A phrase that is wrong takes
the place of a true one, because a phrase added would tell the answer by the caption's length.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import gin
import numpy as np
import seqio
import tensorflow as tf

from richhf_jax import errors, feedback, preprocessors
from richhf_jax.word_table import MODIFIER, NOUN, NUMBER, Entries, Words

# Stands between a caption's tokens and the separators around them while it is taken apart.
_CUT = "\0"
# Folded into the example's seed: one draw each for ...
_KIND_DRAW, _PLACE_DRAW, _PAIR_DRAW, _WORD_DRAW, _ACCEPT_DRAW, _TRUTH_DRAW = range(6)
# Unlike those of `preprocessors`, `augmentation` and `flaws`.
_CORRUPTION_DRAW = 201


class Corrupted(NamedTuple):
    """A caption made wrong.

    Attributes:
      prompt: string [], the wrong caption; the true one if nothing can be exchanged.
      labels: string [], one of feedback.ALIGNED and MISALIGNED for each token, joined by spaces.
      possible: bool [], whether anything could be exchanged.
    """

    prompt: tf.Tensor
    labels: tf.Tensor
    possible: tf.Tensor


class _Caption(NamedTuple):
    """A caption in parts.

    Attributes:
      tokens: string [tokens]; the first and the last may be empty.
      gaps: string [tokens], what follows each token.
      entry: int32 [tokens], its entry in the table; 0 = none, or it must stay.
      named: int32 [entries], how often the caption has each word.
      plural: bool [tokens].
      phrase: bool [tokens, tokens], [i, j]: i is a word of the phrase of noun j.
    """

    tokens: tf.Tensor
    gaps: tf.Tensor
    entry: tf.Tensor
    named: tf.Tensor
    plural: tf.Tensor
    phrase: tf.Tensor


def _parse(text: tf.Tensor, words: Words) -> _Caption:
    table = words.entries
    text = tf.strings.regex_replace(text, r"\x00", " ")
    cut = tf.strings.regex_replace(text, f"({feedback.SEPARATORS.pattern})", rf"{_CUT}\1{_CUT}")
    parts = tf.strings.split(cut, _CUT)
    tokens, gaps = parts[::2], tf.concat([parts[1::2], [""]], 0)
    lower = tf.strings.lower(tokens)
    is_singular = lower[:, None] == table.singular[None, 1:]
    is_plural = (lower[:, None] == table.plural[None, 1:]) & (table.role == NOUN)[None, 1:]
    known = tf.pad(is_singular | is_plural, [[0, 0], [1, 0]])
    entry = tf.where(_may_change(tokens, lower, words.compounds), tf.argmax(known, 1, tf.int32), 0)
    for number, word_class in enumerate(words.word_classes, start=1):
        if word_class.unless:
            agreeing = tf.reduce_any(lower[:, None] == word_class.unless)
            entry = tf.where(agreeing & (tf.gather(table.of_class, entry) == number), 0, entry)
    role = tf.gather(table.role, entry)
    # The phrase of a noun: every word from i to it is a number or a modifier, followed by a single space.
    place = tf.range(tf.size(tokens))
    goes_on = ((role == MODIFIER) | (role == NUMBER)) & (gaps == " ")
    stops = tf.where(~goes_on[None] & (place[None] >= place[:, None]), place[None], tf.size(tokens))
    noun = tf.reduce_min(stops, axis=1)
    phrase = (noun[:, None] == place[None]) & (role == NOUN)[None]
    return _Caption(
        tokens, gaps, entry, tf.reduce_sum(tf.cast(known, tf.int32), 0), tf.reduce_any(is_plural, 1), phrase
    )


def _may_change(tokens: tf.Tensor, lower: tf.Tensor, compounds: Sequence[str]) -> tf.Tensor:
    """Tells which tokens are neither (part of) a name nor part of a compound: bool [tokens].

    A capital may begin a name ('the White House'), unless it begins the caption and no other follows.
    """
    capital = tf.strings.regex_full_match(tokens, "[A-Z].*")
    first = tf.range(tf.size(tokens)) == tf.cast(tokens[0] == "", tf.int32)
    may = ~capital | (first & ~tf.concat([capital[1:], [False]], 0))
    count = tf.size(tokens)
    for length in {len(compound.split()) for compound in compounds}:
        padded = tf.concat([lower, [""] * (length - 1)], 0)
        company = tf.stack([padded[start : start + count] for start in range(length)], 1)
        alike = [compound for compound in compounds if len(compound.split()) == length]
        found = tf.reduce_any(tf.strings.reduce_join(company, 1, separator=" ")[:, None] == alike, 1)
        for start in range(length):
            may &= ~tf.concat([tf.zeros([start], tf.bool), found], 0)[:count]
    return may


def _race(uniform: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Draws an index of the last dimension by weights (0 = never): float32 [..., n] -> int32 [...]."""
    times = tf.where(weights > 0, -tf.math.log1p(-uniform) / weights, np.inf)
    return tf.argmin(times, -1, tf.int32)


def corrupt(text: tf.Tensor, seed: tf.Tensor, words: Words) -> Corrupted:
    """Makes a true caption wrong; see the module's description.

    Args:
      text: string [], the caption.
      seed: int64 [2].
      words: the table.
    """
    table = words.entries
    fold_in = functools.partial(tf.random.experimental.stateless_fold_in, seed)
    caption = _parse(text, words)
    entry, count = caption.entry, tf.size(caption.tokens)
    uniform = tf.random.stateless_uniform(table.weight.shape, fold_in(_WORD_DRAW))
    other, can = _other_words(caption, words, uniform)
    can &= tf.random.stateless_uniform([count], fold_in(_ACCEPT_DRAW)) < tf.gather(table.accepted, entry)
    pairs = _pairs(caption, table)
    sizes = tf.reduce_sum(tf.cast(caption.phrase, tf.int32), 0)
    whole_phrases = (sizes > 1) & tf.reduce_all(can[:, None] | ~caption.phrase, 0)

    # What is exchanged, and where.
    of_class = tf.gather(table.of_class, entry)
    by_class = can & (of_class == tf.range(1, len(table.kinds) - 1)[:, None])
    places = tf.concat([by_class, tf.reduce_any(pairs, 1)[None], whole_phrases[None]], 0)
    kind_weights = tf.where(tf.reduce_any(places, 1), table.kinds, 0)
    kind = _race(tf.random.stateless_uniform(table.kinds.shape, fold_in(_KIND_DRAW)), kind_weights)
    is_swap, is_phrase = kind == len(table.kinds) - 2, kind == len(table.kinds) - 1
    draws = tf.random.stateless_uniform([count], fold_in(_PLACE_DRAW))
    first = tf.argmax(tf.where(places[kind], draws, -1), output_type=tf.int32)
    draws = tf.random.stateless_uniform([count], fold_in(_PAIR_DRAW))
    second = tf.argmax(tf.where(pairs[first], draws, -1), output_type=tf.int32)
    place = tf.range(count)
    changed = (place == first) | (is_swap & (place == second)) | (is_phrase & caption.phrase[:, first])
    swapped = tf.gather(entry, tf.where(place == first, second, first))
    new = tf.where(changed, tf.where(is_swap, swapped, other), entry)

    tokens = _spell(caption, changed, new, table)
    possible = tf.reduce_any(kind_weights > 0) & _may_occur(caption, tokens, new, words)
    tokens = tf.where(possible, tokens, caption.tokens)
    labels = tf.where(possible & changed, str(feedback.MISALIGNED), str(feedback.ALIGNED))
    labels = tf.boolean_mask(labels, tokens != "")
    prompt = tf.strings.reduce_join(tokens + caption.gaps)
    return Corrupted(prompt, tf.strings.reduce_join(labels, separator=" "), possible)


def _other_words(caption: _Caption, words: Words, uniform: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Draws another word of its class for each token: int32 [tokens]; bool [tokens], whether there is one.

    A number that stands before a noun must agree with it: 'two dog toys' stays as it is. A number without a
    noun stays if its class has the number 1, because the verb might have to follow.
    """
    table, entry = words.entries, caption.entry
    same_class = tf.gather(table.of_class, entry)[:, None] == table.of_class[None]
    free = ~(table.once & (caption.named > 0))[None] & (tf.range(len(table.weight))[None] != entry[:, None])
    weights = tf.where(same_class & free, table.weight[None], 0.0)
    other = _race(uniform[None], weights)
    is_number = tf.gather(table.role, entry) == NUMBER
    several = tf.gather(table.value, entry) > 1
    agrees = tf.reduce_any(caption.phrase & (several[:, None] == caption.plural[None]), 1)
    ones = {int(k) for k, value in zip(table.of_class, table.value, strict=True) if value == 1}
    alone = ~tf.reduce_any(caption.phrase, 1)
    for number in ones:
        alone &= tf.gather(table.of_class, entry) != number
    twice = tf.gather(table.once & (caption.named > 1), entry)
    can = (entry > 0) & tf.reduce_any(weights > 0, 1) & ~twice & (~is_number | agrees | alone)
    return other, can


def _pairs(caption: _Caption, table: Entries) -> tf.Tensor:
    """Finds the nouns that can be swapped: bool [tokens, tokens], symmetric.

    They belong to one class and are different. Their phrases have different words of another class.
    """
    entry = caption.entry
    classes = tf.range(1, len(table.kinds) - 1)
    of_class = tf.gather(table.of_class, entry)
    is_noun = tf.gather(table.role, entry) == NOUN
    # [tokens, classes]: the entry of this class in the noun's phrase (their sum, if there are several).
    by_class = tf.where(~is_noun[:, None] & (of_class[:, None] == classes), entry[:, None], 0)
    before = tf.matmul(tf.cast(caption.phrase, tf.int32), by_class, transpose_a=True)
    differ = (before[:, None] != before[None]) & (before[:, None] > 0) & (before[None] > 0)
    alike = (of_class[:, None] == of_class[None]) & (entry[:, None] != entry[None])
    return tf.reduce_any(differ, 2) & alike & is_noun[:, None] & is_noun[None]


def _spell(caption: _Caption, changed: tf.Tensor, new: tf.Tensor, table: Entries) -> tf.Tensor:
    """Writes the tokens again: new words, nouns in the number of their phrase, articles."""
    tokens = caption.tokens
    is_noun = tf.gather(table.role, new) == NOUN
    value = tf.gather(table.value, new)
    numbers = caption.phrase & (changed & (value > 0))[:, None]
    several = tf.reduce_any(numbers & (value > 1)[:, None], 0)
    plural = tf.where(tf.reduce_any(numbers, 0), several, caption.plural)
    respelled = changed | (is_noun & (plural != caption.plural))
    spelled = tf.where(plural, tf.gather(table.plural, new), tf.gather(table.singular, new))
    tokens = tf.where(respelled, _with_capital(spelled, tokens), tokens)
    vowel = tf.strings.regex_full_match(tokens, "(?i)[aeiou].*|hour.*|honest|heir.*")
    vowel &= ~tf.strings.regex_full_match(tokens, "(?i)(eu|one|once|uni|us[aeiu]|uk|ut[aeiou]).*")
    article = tf.strings.regex_full_match(tokens, "(?i)an?") & (caption.gaps == " ")
    follows = tf.concat([respelled[1:], [False]], 0)
    fitting = tf.where(tf.concat([vowel[1:], [False]], 0), "an", "a")
    return tf.where(article & follows, _with_capital(fitting, tokens), tokens)


def _with_capital(words: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """Gives words a capital where those that they replace have one."""
    capital = tf.strings.regex_full_match(like, "[A-Z].*")
    first = tf.strings.upper(tf.strings.substr(words, 0, 1))
    return tf.where(capital, first + tf.strings.substr(words, 1, -1), words)


def _may_occur(caption: _Caption, tokens: tf.Tensor, new: tf.Tensor, words: Words) -> tf.Tensor:
    """Tells whether a true caption could be as the table's limits say: bool []."""
    table = words.entries
    may = tf.constant(True)
    if words.unless:
        may = ~tf.reduce_any(tf.strings.lower(caption.tokens)[:, None] == words.unless)
    if words.most_objects is not None:
        value, is_noun = tf.gather(table.value, new), tf.gather(table.role, new) == NOUN
        counted = tf.reduce_any(caption.phrase & (value > 0)[:, None], 0)
        objects = tf.reduce_sum(value) + tf.reduce_sum(tf.cast(is_noun & ~counted, tf.int32))
        may &= objects <= words.most_objects
    if words.impossible:
        text = tf.strings.lower(tf.strings.reduce_join(tf.boolean_mask(tokens, tokens != ""), separator=" "))
        may &= ~tf.reduce_any(text == words.impossible)
    return may


class _Drawn(NamedTuple):
    """A prompt, maybe made wrong, and the fields of its record.

    Attributes:
      fields: the prompt and its labels, by `feedback`'s names.
      wrong: bool [], whether it was made wrong.
      possible: bool [], whether it could have been.
    """

    fields: Mapping[str, tf.Tensor]
    wrong: tf.Tensor
    possible: tf.Tensor


def _draw(example: Mapping[str, tf.Tensor], table: Words, true_share: float) -> _Drawn:
    """Makes the prompt of an example wrong, or leaves it true, by the example's `preprocessors.SEED`."""
    fold_in = tf.random.experimental.stateless_fold_in
    seed = fold_in(example[preprocessors.SEED], _CORRUPTION_DRAW)
    text = example[feedback.PROMPT_FIELD]
    corrupted = corrupt(text, seed, table)
    draw = tf.random.stateless_uniform([], fold_in(seed, _TRUTH_DRAW))
    wrong = corrupted.possible & (draw >= true_share)
    aligned = tf.strings.regex_replace(corrupted.labels, str(feedback.MISALIGNED), str(feedback.ALIGNED))
    fields = {
        feedback.PROMPT_FIELD: tf.where(wrong, corrupted.prompt, text),
        feedback.KEYWORDS_FIELD: tf.where(wrong, corrupted.labels, aligned),
    }
    return _Drawn(fields, wrong, corrupted.possible)


def _checked_table(words: Callable[[], Words], weight: float = 1.0, **shares: float) -> Words:
    """Returns the table of words, after checks of it and of the settings beside it.

    Raises:
      errors.UserError: one of them makes no sense.
    """
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise errors.UserError(f"corrupted captions: {name} must be 0 to 1, got {value!r}")
    if weight < 0:
        raise errors.UserError(f"corrupted captions: alignment_weight is below 0: {weight!r}")
    table = words()
    table.entries  # noqa: B018 (a bad table is an error here, not in the graph)
    return table


@gin.configurable
def corrupted_captions(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int],
    output_features: Mapping[str, seqio.utils.Feature],
    *,
    variant: str,
    words: Callable[[], Words],
    true_share: float = 0.5,
    true_alignment: float = 1.0,
    wrong_alignment: float = 0.4,
    alignment_weight: float = 1.0,
    empty_heatmaps: bool = False,
) -> tf.data.Dataset:
    """Makes task features, those of `preprocessors.rich_feedback`, of images with true or corrupted captions.

    The example's `preprocessors.SEED` draws whether the caption stays true, and what is wrong in it. Keywords
    have the labels of `corrupt`. The other scores and the implausibility heatmap have no weight.

    Args:
      dataset: examples with an image and a prompt, which is a true caption.
      sequence_length: see `preprocessors`.
      output_features: see `preprocessors`.
      variant: one of feedback.VARIANTS.
      words: returns the table; called when the data set is made, so that gin may set it.
      true_share: share of captions that stay true, of those in which something could be exchanged.
      true_alignment: alignment of a true caption, in [0, 1].
      wrong_alignment: alignment of a corrupted caption.
      alignment_weight: weight of the alignment score in the loss; rich feedback has 1.
      empty_heatmaps: whether true captions also train the misalignment heatmap, which is empty.

    Raises:
      errors.UserError: see `preprocessors.slots_of` and `Words`; or a number is outside [0, 1].
    """
    shares = {"true_share": true_share, "true_alignment": true_alignment, "wrong_alignment": wrong_alignment}
    table = _checked_table(words, alignment_weight, **shares)
    black = tf.io.encode_png(np.zeros((1, 1, 1), np.uint8))

    def to_record(example):
        drawn = _draw(example, table, true_share)
        alignment = tf.where(drawn.wrong, wrong_alignment, true_alignment)
        labels = {
            **dict.fromkeys(feedback.SCORE_FIELDS.values(), tf.constant(np.nan, tf.float32)),
            feedback.SCORE_FIELDS[feedback.ALIGNMENT]: tf.where(drawn.possible, alignment, np.nan),
            **dict.fromkeys(feedback.HEATMAP_FIELDS.values(), tf.where(drawn.wrong, "", black)),
        }
        return example | drawn.fields | labels

    def weigh(features):
        return features | {"score_weights": features["score_weights"] * alignment_weight}

    kinds = (feedback.ALIGNMENT, feedback.KEYWORDS, *([feedback.MISALIGNMENT] if empty_heatmaps else []))
    dataset = dataset.map(to_record, num_parallel_calls=tf.data.AUTOTUNE)
    dataset = preprocessors.rich_feedback(
        dataset, sequence_length, output_features, variant=variant, kinds=kinds
    )
    return dataset.map(weigh, num_parallel_calls=tf.data.AUTOTUNE)


@gin.configurable
def corrupted_rich_feedback(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int],
    output_features: Mapping[str, seqio.utils.Feature],
    *,
    variant: str,
    words: Callable[[], Words],
    wrong_alignment: float = 0.45,
) -> tf.data.Dataset:
    """Makes task features of rich feedback, with prompts made wrong in known words where raters marked none.

    The example's `preprocessors.SEED` draws what is wrong. What was said of the picture alone still holds:
    plausibility, aesthetics and the implausibility heatmap. Keywords have the labels of `corrupt`, alignment
    the value `wrong_alignment`; overall and the misalignment heatmap have no weight. A prompt with marked
    words, or in which nothing can be exchanged, is as in `preprocessors.rich_feedback`.

    Captions are of good pictures. Only these examples show that a damaged square is still one.

    Args:
      dataset: RichHF-18K's records, which are joined with image and prompt.
      sequence_length, output_features: see `preprocessors`.
      variant: one of feedback.VARIANTS.
      words: as of `corrupted_captions`.
      wrong_alignment: alignment of a prompt made wrong, in [0, 1], but no more than the raters' score.

    Raises:
      errors.UserError: see `corrupted_captions`.
    """
    table = _checked_table(words, wrong_alignment=wrong_alignment)
    scores, heatmaps = feedback.SCORE_FIELDS, feedback.HEATMAP_FIELDS

    def to_record(example):
        drawn = _draw(example, table, true_share=0.0)
        text, labels = example[feedback.PROMPT_FIELD], example[feedback.KEYWORDS_FIELD]
        _, fits = preprocessors.mark_misaligned(text, labels)
        is_marked = tf.strings.regex_full_match(labels, f".*{feedback.MISALIGNED}.*")
        wrong = drawn.wrong & fits & ~is_marked
        changed = {
            **drawn.fields,
            scores[feedback.ALIGNMENT]: tf.minimum(example[scores[feedback.ALIGNMENT]], wrong_alignment),
            scores[feedback.OVERALL]: tf.constant(np.nan, tf.float32),
            heatmaps[feedback.MISALIGNMENT]: tf.constant(""),
        }
        return example | {name: tf.where(wrong, new, example[name]) for name, new in changed.items()}

    dataset = dataset.map(to_record, num_parallel_calls=tf.data.AUTOTUNE)
    return preprocessors.rich_feedback(dataset, sequence_length, output_features, variant=variant)
