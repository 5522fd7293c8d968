"""Makes task features of data features, in TensorFlow operations: the seqio tasks' preprocessors.

Each task feature (S = side of the image) has the name of one key of seqio's `sequence_length`, so that the
gin macro TASK_FEATURE_LENGTHS sets every size:

    image            [S, S, 3]           uint8
    image_box        [4]                 int32, the place of a letterboxed image; absent without letterboxing
    inputs           [prompts, length]   int32, 0 = padding
    heatmaps         [heatmaps, S, S]    uint8 / 255
    heatmap_weights  [heatmaps]          float32, 0 = not labelled
    scores           [scores]            float32 in [0, 1]
    score_weights    [scores]            float32, 0 = not labelled
    targets          [texts, target_length]   int32, all padding = not labelled
    texts            [texts]             string, what `targets` encodes
    inputs_words_cut, targets_words_cut  int32, words of the longest prompt or text without room
and, for evaluation, the record's own strings (feedback.FILENAME_FIELD, PROMPT_FIELD, KEYWORDS_FIELD).
Randomness is stateless: it depends on the example's `seed` alone.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import gin
import numpy as np
import seqio
import tensorflow as tf

from richhf_jax import augmentation, errors, feedback, flaws

# Decorates functions that need no AutoGraph, as no Python condition depends on a tensor. Rewriting them takes
# seconds at each start.
plain_graph = tf.autograph.experimental.do_not_convert

# Stands for a hidden word in a caption's input.
MASK = "_"

# A prompt that would not be true of the mirrored picture: a word of it begins so.
_SIDED = r"(?is).*\b(left|right).*"

# The slots of an example, and the kinds that fill them.
_KINDS = {"heatmaps": feedback.HEATMAPS, "scores": feedback.SCORES, "texts": (feedback.KEYWORDS,)}
# The macros that gin/models/rahf.gin puts the lengths together from.
_MACROS = {
    "image": "IMAGE_SIDE",
    "inputs": "TEXT_LENGTH",
    "targets": "TARGET_LENGTH",
    "heatmaps": "NUM_HEATMAPS",
    "scores": "NUM_SCORES",
    "texts": "NUM_TEXTS",
}
_LENGTHS = tuple(_MACROS)
ALL_KINDS = (*feedback.HEATMAPS, *feedback.SCORES, feedback.KEYWORDS)

# int64 [2], given to each example by its reader.
SEED = "seed"
# True if the image is to be augmented, given by the reader. If absent, the graph has no operation for it.
AUGMENT = "augment"
_SHOWN_PROMPT = "shown_prompt"
# Folded into the example's seed, so that an example's random draws are all different.
_HEATMAP_DRAW, _SCORE_DRAW, _CAPTION_DRAW = range(3)


def add_seed(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Gives each example a `SEED`, int64 [2], unless the reader has done so (`input_pipeline` does)."""
    if SEED in dataset.element_spec:
        return dataset
    add = seqio.map_over_dataset(lambda example, seed: example | {SEED: tf.stack(seed)}, num_seeds=1)
    return cast(Any, add)(dataset)


@gin.configurable
@plain_graph
def blind(dataset: tf.data.Dataset, to: str | None = None) -> tf.data.Dataset:
    """Hides the image or the prompt from the model, for ablations; the labels stay.

    Args:
      dataset: examples with an image and a prompt.
      to: None (nothing is hidden), 'image' (black instead) or 'prompt' (empty instead).

    Raises:
      errors.UserError: `to` has another value.
    """
    if to not in (None, "image", "prompt"):
        raise errors.UserError(f"blind.to must be None, 'image' or 'prompt', got {to!r}")
    if to is None:
        return dataset

    def hide(example):
        if to == "prompt":
            return example | {_SHOWN_PROMPT: tf.constant("")}
        # The size stays the same, so that a letterbox stays the same.
        black = tf.zeros_like(augmentation.decode(example[feedback.IMAGE_FIELD], 3))
        return example | {feedback.IMAGE_FIELD: tf.io.encode_png(black)}

    return dataset.map(hide, num_parallel_calls=tf.data.AUTOTUNE)


def _shown_prompt(example: Mapping[str, tf.Tensor]) -> tf.Tensor:
    """Returns the record's prompt, unless `blind` put another in its place."""
    return example.get(_SHOWN_PROMPT, example[feedback.PROMPT_FIELD])


def tokenize_prompt(prompt: tf.Tensor) -> tf.Tensor:
    """Splits as `feedback.tokenize_prompt`: string [] -> string [tokens]; [n] -> ragged [n, tokens]."""
    tokens = tf.strings.split(tf.strings.regex_replace(prompt, feedback.SEPARATORS.pattern, " "), sep=" ")
    return tf.ragged.boolean_mask(tokens, tokens != "")


def mark_misaligned(prompt: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Makes the decoder's target string of a prompt and its labels, and tells whether the labels fit.

    'a yellow cat', '1 0 1' -> 'a yellow_0 cat', True
    'a yellow cat', '1 0'   -> '', False

    Labels that don't fit (another number than the tokens, or neither 0 nor 1) are never paired with words.
    """
    tokens = tokenize_prompt(prompt)
    labels = tf.strings.split(labels)
    misaligned = labels == str(feedback.MISALIGNED)
    known = tf.reduce_all(misaligned | (labels == str(feedback.ALIGNED)))
    fits = known & (tf.size(labels) == tf.size(tokens))
    # Both branches of a tf.where are computed, so this has the tokens' length, whatever the labels' is.
    misaligned = tf.concat([misaligned, tf.zeros_like(tokens == "")], 0)[: tf.size(tokens)]
    words = tf.where(misaligned, tokens + feedback.MISALIGNED_SUFFIX, tokens)
    return tf.where(fits, tf.strings.reduce_join(words, separator=" "), ""), fits


def mask_words(text: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Hides words at random, each with a probability drawn once, uniformly: 'a red star' -> 'a _ star'."""
    words = tf.strings.split(text, sep=" ")
    # The first draw is the probability, the others are the words'.
    draws = tf.random.stateless_uniform([tf.size(words) + 1], seed)
    return tf.strings.reduce_join(tf.where(draws[1:] < draws[0], MASK, words), separator=" ")


def encode(texts: tf.Tensor, length: int, vocabulary: seqio.Vocabulary) -> tuple[tf.Tensor, tf.Tensor]:
    """Encodes texts, each ended by EOS and padded with 0, and counts the words that are cut off.

    ['a b', 'a b c d'] of 3 -> [[a, b, EOS], [a, b, EOS]], 2;  ['a'] of 3 -> [[a, EOS, 0]], 0

    A text that is too long ends before the first word that doesn't fit as a whole. If not even its first word
    fits, it ends within that word, which then counts as cut, too. The number of texts may be known only when
    the graph runs.

    Args:
      texts: string [texts].
      length: tokens of each row.
      vocabulary: encodes the texts; one with `encode_rows` (CLIP's) also cuts and ends them in its own way.

    Returns:
      int32 [texts, length], and int32 [], the largest number of words cut off one text.
    """
    count = texts.shape[0]
    if count == 0:
        return tf.zeros([0, length], tf.int32), tf.zeros([], tf.int32)
    encode_rows = getattr(vocabulary, "encode_rows", None)
    if encode_rows is not None:
        return encode_rows(texts, length)

    # Cutting takes longer than encoding, and is seldom needed.
    too_long = vocabulary.encode_tf(texts).row_lengths() > length - 1
    texts, words_cut = tf.cond(
        tf.reduce_any(too_long),
        lambda: _cut_at_word(texts, too_long, length - 1, vocabulary),
        lambda: (texts, tf.zeros_like(texts, tf.int32)),
    )
    tokens = vocabulary.encode_tf(texts)[:, : length - 1]
    tokens = tf.concat([tokens, tf.fill([tf.size(texts), 1], vocabulary.eos_id)], 1)
    return tokens.to_tensor(shape=[count, length]), tf.reduce_max(words_cut)


def _cut_at_word(
    texts: tf.Tensor, too_long: tf.Tensor, room: int, vocabulary: seqio.Vocabulary
) -> tuple[tf.Tensor, tf.Tensor]:
    """Cuts the texts that are too long to the words that fit into `room` tokens (at least one).

    Returns the texts, and how many words of each are cut, wholly or partly.

    No SentencePiece piece of T5's spans two words, so a text's tokens are those of its words, joined.
    """
    words = tf.strings.split(texts)
    pieces = words.with_flat_values(vocabulary.encode_tf(words.flat_values).row_lengths())
    ends = tf.cumsum(pieces.to_tensor(), axis=1)
    counts = words.row_lengths()
    # Padding fits wherever all words do.
    fitting = tf.minimum(tf.reduce_sum(tf.cast(ends <= room, counts.dtype), axis=1), counts)
    kept = tf.minimum(tf.maximum(fitting, 1), counts)
    first_words = tf.RaggedTensor.from_tensor(words.to_tensor(), lengths=kept)
    shorter = tf.strings.reduce_join(first_words, axis=1, separator=" ")
    # A text that is too long loses something, whatever its words alone come to.
    words_cut = tf.where(too_long, tf.maximum(counts - fitting, 1), 0)
    return tf.where(too_long & (kept < counts), shorter, texts), tf.cast(words_cut, tf.int32)


def draw_kinds(
    all_kinds: tuple[str, ...], kinds: Sequence[str], count: int, seed: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Chooses the kinds that fill the slots: all of them, in order, or `count` labelled ones at random.

    Args:
      all_kinds: kinds that a slot may have.
      kinds: kinds with labels. Others fill slots only if these are too few.
      count: number of slots.
      seed: int64 [2].

    Returns:
      int32 [count], indices into `all_kinds`; float32 [count], 1 if the kind has labels.
    """
    labelled = tf.constant([float(kind in kinds) for kind in all_kinds])
    indices = tf.range(len(all_kinds))
    if count < len(all_kinds):
        shuffled = tf.random.experimental.stateless_shuffle(indices, seed)
        first = tf.argsort(tf.gather(labelled, shuffled), direction="DESCENDING", stable=True)
        indices = tf.gather(shuffled, first)[:count]
    return indices, tf.gather(labelled, indices)


def slots_of(sequence_length: Mapping[str, int], variant: str) -> feedback.Slots:
    """Reads the slot counts from seqio's `sequence_length`.

    Raises:
      errors.UserError: a length is missing, or the counts make no sense for the variant.
    """
    if missing := [name for name in _LENGTHS if name not in (sequence_length or {})]:
        raise errors.UserError(
            f"TASK_FEATURE_LENGTHS needs {', '.join(_LENGTHS)}; there is no {missing[0]!r}"
        )
    if unknown := set(sequence_length) - set(_LENGTHS):
        raise errors.UserError(
            f"TASK_FEATURE_LENGTHS has an unknown {min(unknown)!r}, only {', '.join(_LENGTHS)}"
        )
    for name in _LENGTHS:
        value, may_be_0 = sequence_length[name], name in _KINDS
        if type(value) is not int or (value < 1 and not may_be_0):
            number = "a whole number" if may_be_0 else "a whole number above 0"
            raise errors.UserError(
                f"{_MACROS[name]}, TASK_FEATURE_LENGTHS[{name!r}], must be {number}, got {value!r}"
            )
    for name, kinds in _KINDS.items():
        count, all_kinds = sequence_length[name], len(kinds)
        if not 0 <= count <= all_kinds:
            raise errors.UserError(f"TASK_FEATURE_LENGTHS[{name!r}] must be 0 to {all_kinds}, got {count}")
        if variant == feedback.MULTI_HEAD and count not in (0, all_kinds):
            raise errors.UserError(
                f"TASK_FEATURE_LENGTHS[{name!r}] is {count}, but the multi-head variant has a head per kind:"
                f" it takes 0 or {all_kinds}"
            )
    slots = feedback.Slots(*(sequence_length[name] for name in _KINDS))
    prompts = slots.prompts(variant)
    # seqio trims the first dimension of `inputs`, the prompts, to this length as well.
    if sequence_length["inputs"] < prompts:
        raise errors.UserError(f"TASK_FEATURE_LENGTHS['inputs'] must be at least {prompts}, one per prompt")
    return slots


def _pass_through(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Returns the record's own strings, for evaluation."""
    names = (feedback.FILENAME_FIELD, feedback.PROMPT_FIELD, feedback.KEYWORDS_FIELD)
    return {name: example.get(name, tf.constant("")) for name in names}


def _heatmap_files(example: Mapping[str, tf.Tensor]) -> tf.Tensor:
    """Returns the heatmaps' files in the order of `feedback.HEATMAPS`: string [kinds]."""
    return tf.stack([example[feedback.HEATMAP_FIELDS[kind]] for kind in feedback.HEATMAPS])


def _pictures(example: Mapping[str, tf.Tensor], kinds: tf.Tensor, side: int) -> dict[str, tf.Tensor]:
    """Shows the image and its heatmaps of these kinds by `augmentation.show`; decodes no other heatmap."""
    heatmaps = []
    if kinds.shape[0]:
        maps = tf.gather(_heatmap_files(example), kinds)
        black = tf.io.encode_png(np.zeros((1, 1, 1), np.uint8))  # becomes one of any size
        heatmaps = tf.unstack(tf.where(maps == "", black, maps), kinds.shape[0])
    sided = tf.strings.regex_full_match(example[feedback.PROMPT_FIELD], _SIDED)
    return augmentation.show(
        example[feedback.IMAGE_FIELD],
        heatmaps,
        side,
        example[SEED],
        augment=AUGMENT in example,
        may_flip=~sided,
    )


def _task_prompts(
    example: Mapping[str, tf.Tensor], variant: str, heatmaps: tf.Tensor, scores: tf.Tensor, texts: int
) -> tf.Tensor:
    """Returns the prompts of slots with these kinds (indices, as of `draw_kinds`): string [prompts]."""
    prompt = _shown_prompt(example)[None]
    if variant == feedback.MULTI_HEAD:
        return prompt
    tasks = [
        tf.gather(list(feedback.HEATMAP_TASK_STRINGS.values()), heatmaps),
        tf.gather(list(feedback.SCORE_TASK_STRINGS.values()), scores),
        tf.constant([feedback.KEYWORDS_TASK_STRING] * texts, tf.string),
    ]
    return tf.concat(tasks, 0) + " " + prompt


@plain_graph
def rich_feedback(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int],
    output_features: Mapping[str, seqio.utils.Feature],
    *,
    variant: str,
    kinds: Sequence[str] = ALL_KINDS,
) -> tf.data.Dataset:
    """Makes task features of RichHF-18K records, which are joined with image and prompt.

    With heatmaps = 2, scores = 4, texts = 1, and a record with
        prompt 'a yellow cat', labels '1 0 1', artifact_score 0.75, ...
    the multi-head variant makes
        inputs   ['a yellow cat']               (as tokens, each ended by EOS)
        scores   [0.75, ...]                    in the order of feedback.SCORES
        heatmaps [implausibility, misalignment] in the order of feedback.HEATMAPS
        targets  ['a yellow_0 cat']             (as tokens)
    and the augmented-prompt variant makes the same, but one prompt per slot
        inputs   ['implausibility heatmap a yellow cat', 'misalignment heatmap a yellow cat',
                  'plausibility score a yellow cat', ..., 'misaligned keywords a yellow cat']

    The augmented-prompt variant may ask for fewer heatmaps or scores than there are kinds. Then that many
    kinds are drawn at random for each example, without replacement.

    Four things have no weight: kinds that aren't in `kinds`; scores that are missing (NaN); heatmaps that are
    missing (an empty string instead of a file); and the text slot if the labels don't fit the prompt
    (`postprocessors` names such records). Its target is then empty.

    Raises:
      errors.UserError: see `slots_of`; or one of `kinds` doesn't exist.
    """
    if unknown := set(kinds) - set(ALL_KINDS):
        raise errors.UserError(f"there is no kind {min(unknown)!r}, only {', '.join(ALL_KINDS)}")
    slots = slots_of(sequence_length, variant)
    vocabulary = output_features["inputs"].vocabulary
    score_fields = [feedback.SCORE_FIELDS[kind] for kind in feedback.SCORES]

    def convert(example):
        fold_in = functools.partial(tf.random.experimental.stateless_fold_in, example[SEED])
        heatmap_kinds, heatmap_weights = draw_kinds(
            feedback.HEATMAPS, kinds, slots.heatmaps, fold_in(_HEATMAP_DRAW)
        )
        score_kinds, score_weights = draw_kinds(feedback.SCORES, kinds, slots.scores, fold_in(_SCORE_DRAW))
        prompts = _task_prompts(example, variant, heatmap_kinds, score_kinds, slots.texts)
        text, fits = mark_misaligned(example[feedback.PROMPT_FIELD], example[feedback.KEYWORDS_FIELD])
        fits &= feedback.KEYWORDS in kinds
        texts = tf.fill([slots.texts], text)
        scores = tf.gather([example[field] for field in score_fields], score_kinds)
        known = tf.math.is_finite(scores)
        has_heatmap = tf.gather(_heatmap_files(example) != "", heatmap_kinds)
        inputs, inputs_words_cut = encode(prompts, sequence_length["inputs"], vocabulary)
        targets, targets_words_cut = encode(texts, sequence_length["targets"], vocabulary)
        return {
            **_pictures(example, heatmap_kinds, sequence_length["image"]),
            "inputs": inputs,
            "inputs_words_cut": inputs_words_cut,
            "heatmap_weights": heatmap_weights * tf.cast(has_heatmap, tf.float32),
            "scores": tf.where(known, scores, 0.0),
            "score_weights": score_weights * tf.cast(known, tf.float32),
            "targets": targets * tf.cast(fits, tf.int32),
            "targets_words_cut": targets_words_cut,
            "texts": texts,
            **_pass_through(example),
        }

    return dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE)


@plain_graph
def draw_caption(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Makes file name, image and prompt of TFDS's coco_captions; the example's `SEED` draws the caption.

    image/filename 'COCO_1.jpg', captions {text: ['a red star', 'one star'], ...}
    -> filename 'COCO_1.jpg', prompt 'one star'
    """

    def draw(example):
        seed = tf.random.experimental.stateless_fold_in(example[SEED], _CAPTION_DRAW)
        texts = example["captions"]["text"]
        seed = tf.random.experimental.stateless_fold_in(seed, 2)  # `captions` uses 0 and 1.
        drawn = tf.random.stateless_uniform([], seed, maxval=tf.size(texts), dtype=tf.int32)
        names = {feedback.FILENAME_FIELD: example["image/filename"], feedback.PROMPT_FIELD: texts[drawn]}
        return example | names

    return dataset.map(draw, num_parallel_calls=tf.data.AUTOTUNE)


@gin.configurable
@plain_graph
def captions(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int],
    output_features: Mapping[str, seqio.utils.Feature],
    *,
    variant: str,
    shown_share: float = 0.5,
) -> tf.data.Dataset:
    """Makes task features, of the same shapes as `rich_feedback`'s, of images with true captions.

    The caption 'a red star' gives the text slot
        inputs  'caption' or, in `shown_share` of the examples, 'caption a _ star' (see `mask_words`)
        targets 'a red star'
    Heatmap and score slots are zeros with weight 0 (augmented prompt: with an empty prompt).

    Raises:
      errors.UserError: see `slots_of`.
    """
    slots = slots_of(sequence_length, variant)
    vocabulary = output_features["inputs"].vocabulary
    side = sequence_length["image"]

    def convert(example):
        seed = tf.random.experimental.stateless_fold_in(example[SEED], _CAPTION_DRAW)
        draw = tf.random.stateless_uniform([], tf.random.experimental.stateless_fold_in(seed, 0))
        shown = draw < shown_share
        words = mask_words(_shown_prompt(example), tf.random.experimental.stateless_fold_in(seed, 1))
        task = tf.constant(feedback.CAPTION_TASK_STRING)
        prompt = tf.where(shown, task + " " + words, task)
        unused = slots.heatmaps + slots.scores if variant == feedback.AUGMENTED_PROMPT else 0
        prompts = tf.concat([tf.fill([unused], ""), tf.fill([slots.prompts(variant) - unused], prompt)], 0)
        texts = tf.fill([slots.texts], example[feedback.PROMPT_FIELD])
        inputs, inputs_words_cut = encode(prompts, sequence_length["inputs"], vocabulary)
        targets, targets_words_cut = encode(texts, sequence_length["targets"], vocabulary)
        return {
            **_pictures(example, tf.constant([], tf.int32), side),
            "inputs": inputs,
            "inputs_words_cut": inputs_words_cut,
            "heatmaps": tf.zeros([slots.heatmaps, side, side], tf.uint8),
            "heatmap_weights": tf.zeros([slots.heatmaps]),
            "scores": tf.zeros([slots.scores]),
            "score_weights": tf.zeros([slots.scores]),
            "targets": targets,
            "targets_words_cut": targets_words_cut,
            "texts": texts,
            **_pass_through(example),
        }

    return dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE)


@gin.configurable
@plain_graph
def flawed_captions(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int],
    output_features: Mapping[str, seqio.utils.Feature],
    *,
    variant: str,
    plausibility_weight: float = 0.0,
    clean_plausibility: float = 0.97,
    flaw_cost: float = 0.4,
) -> tf.data.Dataset:
    """Makes task features, of the same shapes as `rich_feedback`'s, of images that `flaws.paint` damages.

    The true caption is the prompt. The implausibility heatmap shows the flaws; it is black if the image stays
    clean. All other labels have weight 0, but plausibility may have a target: a guess by the number of flaws.

    Args:
      dataset: examples with an image and a prompt.
      sequence_length, output_features: as of `rich_feedback`.
      variant: one of `feedback.VARIANTS`.
      plausibility_weight: weight of plausibility's target.
      clean_plausibility: the target of an image without a flaw.
      flaw_cost: what each flaw takes from it; the target is at least 0.

    Raises:
      errors.UserError: see `slots_of` and `flaws.paint`.
    """
    slots = slots_of(sequence_length, variant)
    vocabulary = output_features["inputs"].vocabulary
    side = sequence_length["image"]
    scored = (feedback.PLAUSIBILITY,) if plausibility_weight else ()

    def convert(example):
        fold_in = functools.partial(tf.random.experimental.stateless_fold_in, example[SEED])
        heatmap_kinds, heatmap_weights = draw_kinds(
            feedback.HEATMAPS, (feedback.IMPLAUSIBILITY,), slots.heatmaps, fold_in(_HEATMAP_DRAW)
        )
        score_kinds, score_weights = draw_kinds(feedback.SCORES, scored, slots.scores, fold_in(_SCORE_DRAW))
        pictures = _pictures(example, tf.constant([], tf.int32), side)
        image, heatmap, count = flaws.paint(pictures["image"], example[SEED], pictures.get("image_box"))
        plausibility = tf.maximum(clean_plausibility - flaw_cost * tf.cast(count, tf.float32), 0)
        prompts = _task_prompts(example, variant, heatmap_kinds, score_kinds, slots.texts)
        inputs, inputs_words_cut = encode(prompts, sequence_length["inputs"], vocabulary)
        return {
            **pictures,
            "image": image,
            "inputs": inputs,
            "inputs_words_cut": inputs_words_cut,
            "heatmaps": heatmap * tf.cast(heatmap_weights, tf.uint8)[:, None, None],
            "heatmap_weights": heatmap_weights,
            "scores": plausibility * score_weights,
            "score_weights": plausibility_weight * score_weights,
            "targets": tf.zeros([slots.texts, sequence_length["targets"]], tf.int32),
            "targets_words_cut": tf.zeros([], tf.int32),
            "texts": tf.fill([slots.texts], ""),
            **_pass_through(example),
        }

    return dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE)
