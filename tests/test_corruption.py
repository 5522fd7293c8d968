"""Captions made wrong: worked examples, labels against the meaning, and a reader blind to the image."""

import collections
import functools
import itertools
import re

import gin
import numpy as np
import pytest
import seqio
import tensorflow as tf
from scipy import optimize, sparse, special

from richhf_jax import corruption, errors, feedback, preprocessors, word_table
from richhf_jax.datasets import caption_words, consolidate, prompts
from tasks import synthetic, vocabulary

MULTI_HEAD, AUGMENTED_PROMPT = feedback.VARIANTS
SYNTHETIC = word_table.Words(**caption_words.SYNTHETIC)
ENGLISH = word_table.Words(**caption_words.ENGLISH)


COMPILED = {}


def corrupt_all(texts, words, seed=0, threads=2):
    """Corrupts each caption, the n-th by the seed [seed, n]."""
    if id(words) not in COMPILED:  # The table is kept, so that no other gets its id.
        COMPILED[id(words)] = tf.function(lambda text, key: corruption.corrupt(text, key, words)), words
    corrupt, _ = COMPILED[id(words)]
    dataset = tf.data.Dataset.from_tensor_slices(list(texts)).enumerate()
    dataset = dataset.map(
        lambda number, text: corrupt(text, tf.stack([tf.constant(seed, tf.int64), number])),
        num_parallel_calls=threads,
    )
    return [
        (c.prompt.decode(), feedback.parse_labels(c.labels.decode()), bool(c.possible))
        for c in dataset.as_numpy_iterator()
    ]


def outcomes(text, words, draws=300):
    """The different results of many seeds: {(prompt, labels)}."""
    return {
        (prompt, feedback.format_labels(labels)) for prompt, labels, _ in corrupt_all([text] * draws, words)
    }


def classes(**changes):
    """The synthetic classes with changed fields: colour={'weight': 0}."""
    table = {name: dict(fields) for name, fields in caption_words.SYNTHETIC["classes"].items()}
    for name, fields in changes.items():
        table[name] |= fields
    return table


@functools.cache
def only(kind):
    """The synthetic table with one kind of exchange: a class, 'swap' or 'phrase'."""
    table = classes(**{name: {"weight": float(name == kind)} for name in SYNTHETIC.classes})
    weights = {"swap_weight": float(kind == "swap"), "phrase_weight": float(kind == "phrase")}
    return word_table.Words.changed(caption_words.SYNTHETIC, classes=table, **weights)


@pytest.mark.parametrize(
    ("kind", "prompt", "labels"),
    [
        ("colour", "A blue star, and one circle.", "1 0 1 1 1 1"),
        ("count", "A red star, and two circles.", "1 1 1 1 0 1"),
        ("shape", "A red ring, and one circle.", "1 1 0 1 1 1"),
        ("phrase", "A blue ring, and one circle.", "1 0 0 1 1 1"),
        ("colour", "An orange star, and one circle.", "1 0 1 1 1 1"),
    ],
)
def test_worked_examples(kind, prompt, labels):
    assert (prompt, labels) in outcomes("A red star, and one circle.", only(kind))


def test_two_nouns_are_swapped():
    # Only one outcome: each noun has a colour, and the nouns keep their places' numbers.
    found = outcomes('Two "red" stars; a blue circle!', only("swap"), 20)
    assert found == {('Two "red" stars; a blue circle!', "1 1 1 1 1 1")}  # The quotes part the phrase.
    assert outcomes("Two red stars; a blue circle!", only("swap"), 20) == {
        ("Two red circles; a blue star!", "1 1 0 1 1 0")
    }
    # "a star and a circle" would still be true.
    assert not any(possible for *_, possible in corrupt_all(["a circle and a star"] * 5, only("swap")))


def test_a_number_changes_the_nouns_form_alone():
    found = outcomes("two small stars", only("count"))
    assert found == {("one small star", "0 1 1"), ("three small stars", "0 1 1")}


def test_the_same_seed_gives_the_same_caption():
    texts = ["a red star and two blue rings", "one large green cross", "a circle"] * 20
    first = corrupt_all(texts, SYNTHETIC, threads=1)
    assert first == corrupt_all(texts, SYNTHETIC, threads=2)
    assert first != corrupt_all(texts, SYNTHETIC, seed=1)
    # These stay the same in later versions, so that runs can be repeated.
    assert first[:3] == PINNED


PINNED = [
    ("a red ring and two blue stars", [1, 1, 0, 1, 1, 1, 0], True),
    ("one large black cross", [1, 1, 0, 1], True),
    ("a square", [1, 0], True),
]


@pytest.mark.parametrize(
    "text", ["", ",.", " ", "ein Bild mit Formen", "naïve 日本 🎉", "The White House", "a\nred"]
)
def test_a_caption_without_words_of_the_table_stays_true(text):
    (result,) = corrupt_all([text], ENGLISH)
    assert result == (text, [1] * len(feedback.tokenize_prompt(text)), False)


# Independent check on the synthetic world: parse the captions, compare what they say.

PHRASE = re.compile(r"(a|an|one|two|three) (?:(small|large) )?(\w+) (\w+)")
SINGULAR = {plural: shape for shape, plural in prompts.SHAPES.items()} | {
    shape: shape for shape in prompts.SHAPES
}


def parse(prompt):
    """Parses a prompt; the result must spell the same, which checks articles and plurals."""
    opening = next(o for o in sorted(set(prompts.OPENINGS), reverse=True) if prompt.startswith(o))
    found = list(PHRASE.finditer(prompt, len(opening)))
    phrases = tuple(prompts.Phrase({"an": "a"}.get(m[1], m[1]), m[2], m[3], SINGULAR[m[4]]) for m in found)
    joint = prompt[found[-2].end() : found[-1].start()] if len(found) > 1 else ""
    description = prompts.Description(opening, phrases, joint)
    assert description.prompt == prompt
    return description


def synthetic_captions(count, seed=0):
    rng = np.random.default_rng(seed)
    return [prompts.sample_description(rng, "train").prompt for _ in range(count)]


def kind_and_labels(true, wrong):
    """What a caption got wrong, and the labels that it must have, from the meaning alone."""
    assert (true.opening, true.last_joint, len(true.phrases)) == (
        wrong.opening,
        wrong.last_joint,
        len(wrong.phrases),
    )
    attributes = ("count_word", "size", "colour", "shape")
    changed = [
        (i, name)
        for i, (before, after) in enumerate(zip(true.phrases, wrong.phrases, strict=True))
        for name in attributes
        if getattr(before, name) != getattr(after, name)
    ]
    places, names = zip(*changed, strict=True)
    if len(changed) == 1:
        kind = names[0]
    elif set(names) == {"shape"}:
        i, j = places
        assert wrong.phrases[i].shape == true.phrases[j].shape
        assert wrong.phrases[j].shape == true.phrases[i].shape
        kind = "swap"
    else:
        phrase = true.phrases[places[0]]
        said = {name for name in attributes if getattr(phrase, name) not in (None, prompts.ARTICLE)}
        assert (set(places), set(names)) == ({places[0]}, said)
        kind = "phrase"
    labels = [1] * len(wrong.opening.split())
    for i, phrase in enumerate(wrong.phrases):
        labels += [1] * (i > 0 and i == len(wrong.phrases) - 1)
        labels += [int((i, "count_word") not in changed)]
        labels += [int((i, "size") not in changed)] * (phrase.size is not None)
        labels += [int((i, "colour") not in changed), int((i, "shape") not in changed)]
    return kind, labels


def test_synthetic_captions_against_their_meaning():
    texts = synthetic_captions(1500)
    kinds = collections.Counter()
    for text, (prompt, labels, possible) in zip(texts, corrupt_all(texts, SYNTHETIC), strict=True):
        true, wrong = parse(text), parse(prompt)
        if not possible:
            assert (prompt, set(labels)) == (text, {1})
            continue
        kind, expected = kind_and_labels(true, wrong)
        kinds[kind] += 1
        assert labels == expected, prompt
        # The picture shows the true phrases, and no wrong one among them.
        assert sorted(map(str, true.phrases)) != sorted(map(str, wrong.phrases))
        # As in true captions: all shapes and colours differ, and there are few objects.
        assert (
            len({p.shape for p in wrong.phrases})
            == len({p.colour for p in wrong.phrases})
            == len(wrong.phrases)
        )
        assert sum(p.count for p in wrong.phrases) <= prompts.MAX_DESCRIBED_OBJECTS
        assert len(wrong.phrases) > 1 or wrong.split == "train"
    assert kinds.keys() == {"count_word", "size", "colour", "shape", "swap", "phrase"}
    assert min(kinds.values()) > 50
    assert kinds.total() > 0.85 * len(texts)


# Frequencies.


def test_corrupted_counts_are_as_frequent_as_true_ones():
    shares = np.array([0.17, 0.15, 0.08]) / 0.4
    texts = [
        f"{word} circle{'s' * (word != 'one')}"
        for word in np.random.default_rng(1).choice(["one", "two", "three"], 3000, p=shares)
    ]
    words = word_table.Words.changed(
        caption_words.SYNTHETIC, classes=classes(shape={"weight": 0}), phrase_weight=0
    )
    found = collections.Counter(prompt.split()[0] for prompt, _, _ in corrupt_all(texts, words))
    for word, share in zip(("one", "two", "three"), shares, strict=True):
        # Four standard deviations; without exchange_weights, "three" would have 0.27 instead of 0.2.
        assert abs(found[word] / 3000 - share) < 4 * np.sqrt(share * (1 - share) / 3000)


# A reader who doesn't see the image.


def reader_features(texts):
    """Words, neighbours, repetitions and the length of each caption."""
    for text in texts:
        words = ["^", *feedback.tokenize_prompt(text.lower()), "$"]
        repeated = {f"{word} twice" for word, count in collections.Counter(words).items() if count > 1}
        yield {*words, *map(" ".join, itertools.pairwise(words)), *repeated, f"{len(words)} words"}


def blind_accuracy(pairs, seed=0):
    """Accuracy of logistic regression on a third of the captions that it wasn't fitted to, and their number.

    The reader sees one caption of each pair, the true one or the corrupted one.
    """
    truth = np.random.default_rng(seed).permutation(len(pairs)) % 2
    rows = list(reader_features(pair[is_true] for pair, is_true in zip(pairs, truth, strict=True)))
    frequent = collections.Counter(itertools.chain.from_iterable(rows))
    columns = {feature: i for i, feature in enumerate(sorted(f for f, n in frequent.items() if n > 5))}
    places = [(i, columns[feature]) for i, row in enumerate(rows) for feature in row if feature in columns]
    x = sparse.csr_matrix((np.ones(len(places)), tuple(zip(*places, strict=True))), (len(rows), len(columns)))
    signs, fitted = 2 * truth - 1, 2 * len(pairs) // 3

    def loss(weights):
        margins = signs[:fitted] * (x[:fitted] @ weights)
        slope = -x[:fitted].T @ (signs[:fitted] * special.expit(-margins))
        return np.logaddexp(0, -margins).sum() + 2 * weights @ weights, slope + 4 * weights

    result = optimize.minimize(
        loss, np.zeros(len(columns)), jac=True, method="L-BFGS-B", options={"maxiter": 60}
    )
    right = np.sign(x[fitted:] @ result.x) == signs[fitted:]
    return right.mean(), len(right)


def pairs_of(texts, words):
    """(corrupted, true) of each caption that can be corrupted."""
    found = zip(corrupt_all(texts, words), texts, strict=True)
    return [(prompt, text) for (prompt, _, possible), text in found if possible]


def chance_bound(count):
    """Three standard deviations above one half: a fair coin is beyond in one of 740 tests."""
    return 0.5 + 3 * 0.5 / np.sqrt(count)


def english_captions(count):
    """Captions of a grammar whose words are independent and have the table's frequencies."""
    rng = np.random.default_rng(2)
    table = {name: word_table.WordClass(**fields).frequencies() for name, fields in ENGLISH.classes.items()}

    def draw(name, plural=False):
        shares = np.array(list(table[name].values()))
        word = str(rng.choice(list(table[name]), p=shares / shares.sum()))
        return word.split("/")[-1 if plural else 0]

    def with_article(*words):
        return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"

    made = []
    for _ in range(count):
        several = rng.random() < 0.4
        animals = (
            f"{draw('number')} {draw('colour')} {draw('animal', True)}"
            if several
            else with_article(draw("animal"))
        )
        thing = (
            with_article(draw("vehicle"))
            if rng.random() < 0.5
            else with_article(draw("colour"), draw("tableware"))
        )
        text = f"{animals} next to {thing} in {with_article(draw('size'), draw('room'))}."
        made.append(text[0].upper() + text[1:])
    return made


@pytest.mark.parametrize("kind", ["synthetic", "english"])
def test_a_reader_blind_to_the_image_stays_at_chance(kind):
    texts, words = (
        (synthetic_captions(3600), SYNTHETIC) if kind == "synthetic" else (english_captions(3000), ENGLISH)
    )
    pairs = pairs_of(texts, words)
    assert len(pairs) > 2900
    accuracy, count = blind_accuracy(pairs)
    assert 0.5 - (chance_bound(count) - 0.5) < accuracy < chance_bound(count)


@pytest.mark.parametrize(
    "colour", [{"once": False}, {"words": dict(zip(prompts.COLOURS, (9, 1, 1, 3, 3, 3), strict=True))}]
)
def test_the_blind_reader_finds_leaks(colour):
    # Colours that true captions never name twice, and colours too frequent or too rare.
    table = classes(colour=colour, shape={"weight": 0}, size={"weight": 0}, count={"weight": 0})
    words = word_table.Words.changed(
        caption_words.SYNTHETIC, classes=table, swap_weight=0.0, phrase_weight=0.0
    )
    texts = [text for text in synthetic_captions(3000) if len(parse(text).phrases) > 1]
    accuracy, count = blind_accuracy(pairs_of(texts, words))
    assert accuracy > chance_bound(count)


# English.


@pytest.mark.parametrize(
    ("text", "exchanged"),
    [
        ("A man with a horse", {"man", "horse"}),
        ("A man with his horse", {"horse"}),  # "his" keeps the man.
        ("A hot dog and a sandwich.", {"sandwich"}),
        ("a black and white cat", {"cat"}),
        ("A dog near the dog house", {"house"}),  # A dog named twice.
        ("two large dogs", {"two", "large", "dogs"}),
        ("Two dog toys", {"dog"}),  # The number doesn't agree with the dog.
        ("Two of the cats", {"Two", "cats"}),
        ("Red buses", {"Red", "buses"}),
        ("the RED BUS on Red Square", set()),
    ],
)
def test_english_words_that_are_exchanged(text, exchanged):
    tokens = feedback.tokenize_prompt(text)
    found = set()
    for prompt, labels in outcomes(text, ENGLISH, 100):
        assert len(feedback.tokenize_prompt(prompt)) == len(tokens)
        found |= {token for token, label in zip(tokens, labels.split(), strict=True) if label == "0"}
    assert found == exchanged


def test_english_articles_and_plurals():
    found = {prompt for prompt, _ in outcomes("An umbrella beside two men.", ENGLISH)}
    assert {"A kite beside two men.", "A frisbee beside two men.", "An umbrella beside two women."} <= found
    found = {prompt for prompt, _ in outcomes("A bowl in a red kitchen", ENGLISH)}
    assert {"A bowl in a red office", "A bowl in a red bathroom"} <= found
    assert {prompt for prompt, _ in outcomes("In a kitchen", ENGLISH)} >= {"In an office", "In a garage"}
    words = word_table.Words(
        {"it": {"words": ("unicorn/unicorns", "owl/owls", "hour/hours"), "role": "noun"}}
    )
    assert {prompt for prompt, _ in outcomes("AN owl", words)} == {"A unicorn", "An hour"}


@pytest.mark.parametrize(
    "text",
    ["a man without a hat", "There are no dogs", "Not a red dog", "a dog or a cat", "It isn't a dog."],
)
def test_what_is_denied_or_left_open_stays(text):
    for seed in range(5):
        assert not corrupt_all([text], ENGLISH, seed)[0][2]


def test_a_null_character_is_a_separator():
    prompt, labels, possible = corrupt_all(["a\0red dog"], ENGLISH)[0]
    assert possible
    assert len(labels) == len(feedback.tokenize_prompt(prompt)) == 3


# The preprocessor.

LENGTHS = {"image": 8, "inputs": 24, "targets": 24, "heatmaps": 2, "scores": 4, "texts": 1}
FEATURES = {"inputs": seqio.Feature(vocabulary.get_vocabulary())}
IMAGE = consolidate.encode_png(np.full((8, 8, 3), 99, np.uint8))
TRUE = "a red star, and one blue ring"


def run(
    text=TRUE,
    count=60,
    variant=MULTI_HEAD,
    preprocess=corruption.corrupted_captions,
    lengths=None,
    labels=None,
    **kwargs,
):
    record = {feedback.FILENAME_FIELD: "1.png", feedback.IMAGE_FIELD: IMAGE, feedback.PROMPT_FIELD: text}
    record |= labels or {}
    dataset = tf.data.Dataset.from_tensors(record).repeat(count).enumerate()
    dataset = dataset.map(lambda n, e: e | {preprocessors.SEED: tf.stack([tf.zeros_like(n), n])})
    dataset = preprocess(dataset, {**LENGTHS, **(lengths or {})}, FEATURES, variant=variant, **kwargs)
    return dataset.element_spec, list(dataset.as_numpy_iterator())


def corrupted(*args, **kwargs):
    return run(*args, words=lambda: SYNTHETIC, **kwargs)[1]


def is_true(example):
    return example[feedback.PROMPT_FIELD].decode() == TRUE


def test_the_labels_of_true_and_wrong_captions():
    settings = {"true_alignment": 0.9, "wrong_alignment": 0.3, "alignment_weight": 0.5}
    examples = corrupted(count=200, empty_heatmaps=True, **settings)
    # Half are true: within three standard deviations of a fair coin.
    assert abs(sum(map(is_true, examples)) - 100) < 22
    for example in examples:
        true = is_true(example)
        tokens = feedback.tokenize_prompt(example[feedback.PROMPT_FIELD].decode())
        labels = feedback.parse_labels(example[feedback.KEYWORDS_FIELD].decode())
        assert all(labels) == true
        assert example["texts"].tolist() == [feedback.mark_misaligned(tokens, labels).encode()]
        weights = dict(zip(feedback.SCORES, example["score_weights"], strict=True))
        assert weights.pop(feedback.ALIGNMENT) == 0.5
        assert not any(weights.values())
        alignment = example["scores"][feedback.SCORES.index(feedback.ALIGNMENT)]
        assert alignment == np.float32(0.9 if true else 0.3)
        weights = dict(zip(feedback.HEATMAPS, example["heatmap_weights"], strict=True))
        assert weights == {feedback.IMPLAUSIBILITY: 0, feedback.MISALIGNMENT: true}
        assert not example["heatmaps"].any()


def test_a_caption_that_cannot_be_exchanged_has_no_alignment():
    for example in corrupted(text="some shapes", count=4):
        assert example["texts"].tolist() == [b"some shapes"]
        assert example["targets"].any()
        assert not example["score_weights"].any()
        assert not example["heatmap_weights"].any()


def test_the_augmented_prompt_asks_for_what_has_labels():
    few = {"heatmaps": 1, "scores": 2}
    for example in corrupted(variant=AUGMENTED_PROMPT, lengths=few, empty_heatmaps=True, count=20):
        texts = [FEATURES["inputs"].vocabulary.decode(row[row > 1].tolist()) for row in example["inputs"]]
        shown = example[feedback.PROMPT_FIELD].decode()
        assert texts[0] == f"{feedback.HEATMAP_TASK_STRINGS[feedback.MISALIGNMENT]} {shown}"
        assert texts[1] == f"{feedback.SCORE_TASK_STRINGS[feedback.ALIGNMENT]} {shown}"
        assert texts[3] == f"{feedback.KEYWORDS_TASK_STRING} {shown}"
        assert example["score_weights"][1] == 0


def test_the_shapes_are_those_of_captions():
    settings = {"variant": AUGMENTED_PROMPT, "lengths": {"heatmaps": 1, "scores": 2}}
    spec, _ = run(count=0, words=lambda: SYNTHETIC, **settings)
    other, _ = run(count=0, preprocess=preprocessors.captions, **settings)
    assert spec == other


GREY = consolidate.encode_png(np.full((8, 8), 51, np.uint8))


def corrupted_feedback(keywords, alignment=0.9, **kwargs):
    scores = dict.fromkeys(feedback.SCORE_FIELDS.values(), np.float32(0.8))
    scores[feedback.SCORE_FIELDS[feedback.ALIGNMENT]] = np.float32(alignment)
    labels = {
        feedback.KEYWORDS_FIELD: keywords,
        **scores,
        **dict.fromkeys(feedback.HEATMAP_FIELDS.values(), GREY),
    }
    settings = {"labels": labels, "words": lambda: SYNTHETIC} | kwargs
    return run(preprocess=corruption.corrupted_rich_feedback, **settings)


def test_what_holds_of_rich_feedback_whose_prompt_is_made_wrong():
    _, examples = corrupted_feedback("1 1 1 1 1 1 1", count=20, wrong_alignment=0.3)
    for example in examples:
        assert not is_true(example)
        tokens = feedback.tokenize_prompt(example[feedback.PROMPT_FIELD].decode())
        labels = feedback.parse_labels(example[feedback.KEYWORDS_FIELD].decode())
        assert not all(labels)
        assert example["texts"].tolist() == [feedback.mark_misaligned(tokens, labels).encode()]
        scores = dict(zip(feedback.SCORES, example["scores"].tolist(), strict=True))
        weights = dict(zip(feedback.SCORES, example["score_weights"].tolist(), strict=True))
        assert scores[feedback.PLAUSIBILITY] == scores[feedback.AESTHETICS] == np.float32(0.8)
        assert scores[feedback.ALIGNMENT] == np.float32(0.3)
        assert weights == dict.fromkeys(feedback.SCORES, 1.0) | {feedback.OVERALL: 0.0}
        assert example["heatmap_weights"].tolist() == [1.0, 0.0]
        assert example["heatmaps"].max((1, 2)).tolist() == [51, 0]


def test_a_prompt_with_a_marked_word_stays():
    for keywords in ("1 0 1 1 1 1 1", "1 1"):  # The second one's labels don't fit the prompt.
        _, examples = corrupted_feedback(keywords, count=5)
        assert all(map(is_true, examples))
        for example in examples:
            assert example["heatmap_weights"].tolist() == [1.0, 1.0]
            assert example["score_weights"].all()
            assert example["targets"].any() == (keywords != "1 1")


def test_a_score_below_that_of_wrong_prompts_stays():
    _, examples = corrupted_feedback("1 1 1 1 1 1 1", alignment=0.2, count=5)
    assert {example["scores"][feedback.SCORES.index(feedback.ALIGNMENT)] for example in examples} == {
        np.float32(0.2)
    }
    assert not any(map(is_true, examples))


def test_one_drawn_heatmap_that_is_missing_has_no_weight():
    settings = {"variant": AUGMENTED_PROMPT, "lengths": {"heatmaps": 1, "scores": 2}}
    _, examples = corrupted_feedback("1 1 1 1 1 1 1", count=40, **settings)
    drawn = set()
    for example in examples:
        text = FEATURES["inputs"].vocabulary.decode([int(i) for i in example["inputs"][0] if i > 1])
        known = text.startswith(feedback.HEATMAP_TASK_STRINGS[feedback.IMPLAUSIBILITY])
        assert example["heatmap_weights"].tolist() == [float(known)]
        assert example["heatmaps"].max() == 51 * known
        drawn.add(known)
    assert drawn == {True, False}


def test_gin_changes_the_table():
    gin.bind_parameter("tasks.synthetic.synthetic_words.swap_weight", 0.0)
    gin.bind_parameter(
        "tasks.synthetic.synthetic_words.classes", {"c": {"words": ("red", "pink"), "role": "modifier"}}
    )
    _, examples = run(words=synthetic.synthetic_words, true_share=0.0, count=3)
    assert {example["texts"].item() for example in examples} == {b"a pink_0 star and one blue ring"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"true_share": 1.5}, "true_share must be 0 to 1"),
        ({"alignment_weight": -1.0}, "alignment_weight is below 0"),
    ],
)
def test_bad_numbers_are_named(changes, message):
    with pytest.raises(errors.UserError, match=message):
        corrupted(**changes)


def test_bad_numbers_of_corrupted_feedback_are_named():
    with pytest.raises(errors.UserError, match="wrong_alignment must be 0 to 1, got 7"):
        corrupted_feedback("1", wrong_alignment=7)
