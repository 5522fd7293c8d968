import functools

import gin
import numpy as np
import pytest
import seqio
import tensorflow as tf

from richhf_jax import errors, feedback, gin_utils, preprocessors
from richhf_jax.datasets import consolidate
from tasks import vocabulary

MULTI_HEAD, AUGMENTED_PROMPT = feedback.VARIANTS
LENGTHS = {"image": 8, "inputs": 16, "targets": 16, "heatmaps": 2, "scores": 4, "texts": 1}
VOCABULARY = vocabulary.get_vocabulary()
FEATURES = {"inputs": seqio.Feature(VOCABULARY)}


def record(**changes):
    rng = np.random.default_rng(0)
    return {
        feedback.FILENAME_FIELD: "train/1.png",
        feedback.IMAGE_FIELD: consolidate.encode_png(rng.integers(0, 256, (8, 8, 3), np.uint8)),
        feedback.PROMPT_FIELD: "a red star, and one blue ring",
        feedback.KEYWORDS_FIELD: "1 0 1 1 1 1 0",
        **{field: np.float32(i / 4) for i, field in enumerate(feedback.SCORE_FIELDS.values())},
        **{
            field: consolidate.encode_png(np.full((8, 8), 100 + i, np.uint8))
            for i, field in enumerate(feedback.HEATMAP_FIELDS.values())
        },
        **changes,
    }


def run(preprocess, *, seeds=(0,), lengths=None, example=None, **kwargs):
    """Runs a task's preprocessors once for each seed, and returns the examples."""
    example = example or record()
    dataset = tf.data.Dataset.from_tensors(example).repeat(len(seeds))
    pairs = tf.data.Dataset.from_tensor_slices(np.int64([[0, seed] for seed in seeds]))
    dataset = tf.data.Dataset.zip(dataset, pairs).map(lambda e, seed: e | {preprocessors.SEED: seed})
    dataset = preprocessors.blind(preprocessors.add_seed(dataset))
    dataset = preprocess(
        dataset, sequence_length={**LENGTHS, **(lengths or {})}, output_features=FEATURES, **kwargs
    )
    return list(dataset.as_numpy_iterator())


rich_feedback = functools.partial(run, preprocessors.rich_feedback)
captions = functools.partial(run, preprocessors.captions)
flawed_captions = functools.partial(run, preprocessors.flawed_captions)


def decoded(tokens):
    """Decodes rows of tokens; each must end with EOS and padding."""
    texts = []
    for row in tokens:
        (end,) = np.flatnonzero(row == VOCABULARY.eos_id)
        assert not row[end + 1 :].any()
        texts.append(VOCABULARY.decode(row[:end].tolist()))
    return texts


PROMPTS = [
    "a yellow cat",
    'A red cat, "happy" as ever!',
    "  two  spaces ;and: marks?!...",
    "",
    ",.",
    "naïve café – ünïcode",
    "日本の 赤い,猫",
    "an emoji 🎉🎊 party",
    "a\ttab and\nline",
    "ends_0 with the suffix_0",
    "non\u00a0breaking\u3000spaces",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_mark_misaligned_is_that_of_feedback(prompt, rng):
    tokens = feedback.tokenize_prompt(prompt)
    labels = rng.integers(0, 2, len(tokens)).tolist()
    text, fits = preprocessors.mark_misaligned(
        tf.constant(prompt), tf.constant(feedback.format_labels(labels))
    )
    assert text.numpy().decode() == feedback.mark_misaligned(tokens, labels)
    assert fits
    assert [t.decode() for t in preprocessors.tokenize_prompt(tf.constant(prompt)).numpy()] == tokens


@pytest.mark.parametrize("labels", ["", "1 0", "1 0 1 1", "1 2 1", "1 x 0"])
def test_labels_that_do_not_fit_are_not_paired(labels):
    text, fits = preprocessors.mark_misaligned(tf.constant("a yellow cat"), tf.constant(labels))
    assert not fits
    assert text == ""


def test_encode_ends_pads_and_cuts():
    a, red, star = VOCABULARY.encode("a red star")
    texts = tf.constant(["a", "a red star", "a red star a  star", ""])
    tokens, words_cut = preprocessors.encode(texts, 4, VOCABULARY)
    np.testing.assert_array_equal(tokens, [[a, 1, 0, 0], [a, red, star, 1], [a, red, star, 1], [1, 0, 0, 0]])
    assert words_cut == 2
    assert tokens.dtype == words_cut.dtype == tf.int32


def test_encode_cuts_before_a_word_that_does_not_fit():
    # "zyxw" is four pieces: letters, of which the first stands with the mark of a word's start.
    for length in range(2, 12):
        tokens, words_cut = preprocessors.encode(tf.constant(["a red zyxw zyxw"]), length, VOCABULARY)
        (text,) = decoded(tokens.numpy())
        room = length - 1
        words = ["a", "red", "zyxw", "zyxw"]
        ends = np.cumsum([len(VOCABULARY.encode(word)) for word in words])
        fitting = max(1, int((ends <= room).sum()))
        assert (text.split(), words_cut) == (words[:fitting], 4 - fitting)


def test_a_first_word_that_does_not_fit_is_cut_within():
    tokens, words_cut = preprocessors.encode(tf.constant(["zyxw a"]), 3, VOCABULARY)
    np.testing.assert_array_equal(tokens[0], [*VOCABULARY.encode("zyxw")[:2], 1])
    assert words_cut == 2


def test_a_text_of_one_word_that_does_not_fit_is_cut_and_says_so():
    _, words_cut = preprocessors.encode(tf.constant(["zyxw"]), 3, VOCABULARY)
    assert words_cut == 1


def test_no_text_at_all():
    tokens, words_cut = preprocessors.encode(tf.constant(["", ""]), 3, VOCABULARY)
    np.testing.assert_array_equal(tokens, [[1, 0, 0], [1, 0, 0]])
    assert words_cut == 0


def test_cut_words_are_counted():
    (example,) = rich_feedback(variant=AUGMENTED_PROMPT, lengths={"inputs": 8, "targets": 8})
    assert decoded(example["inputs"])[-1] == "misaligned keywords a red star, and"
    assert decoded(example["targets"]) == ["a red_0 star and one blue"]
    assert (example["inputs_words_cut"], example["targets_words_cut"]) == (3, 1)


def test_multi_head_example():
    (example,) = rich_feedback(variant=MULTI_HEAD)
    original = record()
    assert decoded(example["inputs"]) == ["a red star, and one blue ring"]
    assert decoded(example["targets"]) == ["a red_0 star and one blue ring_0"]
    assert example["texts"].tolist() == [b"a red_0 star and one blue ring_0"]
    np.testing.assert_array_equal(example["image"], tf.io.decode_png(original[feedback.IMAGE_FIELD]))
    assert example["heatmaps"].dtype == np.uint8
    np.testing.assert_array_equal(example["heatmaps"], np.broadcast_to([[[100]], [[101]]], (2, 8, 8)))
    np.testing.assert_array_equal(example["heatmap_weights"], [1, 1])
    np.testing.assert_array_equal(example["scores"], np.float32([0, 0.25, 0.5, 0.75]))
    np.testing.assert_array_equal(example["score_weights"], [1, 1, 1, 1])
    for field in (feedback.FILENAME_FIELD, feedback.PROMPT_FIELD, feedback.KEYWORDS_FIELD):
        assert example[field].decode() == original[field]


def test_augmented_prompt_example():
    multi_head, augmented = (rich_feedback(variant=variant)[0] for variant in feedback.VARIANTS)
    prompt = "a red star, and one blue ring"
    assert decoded(augmented.pop("inputs")) == [
        f"implausibility heatmap {prompt}",
        f"misalignment heatmap {prompt}",
        f"plausibility score {prompt}",
        f"alignment score {prompt}",
        f"aesthetics score {prompt}",
        f"overall score {prompt}",
        f"misaligned keywords {prompt}",
    ]
    del multi_head["inputs"]
    assert augmented.keys() == multi_head.keys()
    for name, value in augmented.items():
        np.testing.assert_array_equal(value, multi_head[name], err_msg=name)


def test_fewer_slots_hold_kinds_drawn_without_replacement():
    examples = rich_feedback(
        variant=AUGMENTED_PROMPT, seeds=range(200), lengths={"heatmaps": 1, "scores": 2, "texts": 0}
    )
    pairs = []
    for example in examples:
        heatmap, *scores = decoded(example["inputs"])
        kind = heatmap.split()[0]
        assert example["heatmaps"].shape == (1, 8, 8)
        np.testing.assert_array_equal(example["heatmaps"], 100 + feedback.HEATMAPS.index(kind))
        kinds = [feedback.SCORES.index(text.split()[0]) for text in scores]
        np.testing.assert_array_equal(example["scores"], np.float32(kinds) / 4)
        assert example["targets"].shape == (0, 16)
        pairs.append((kind, *kinds))
    heatmaps, *scores = zip(*pairs, strict=True)
    assert 70 < heatmaps.count("misalignment") < 130
    assert all(first != second for first, second in zip(*scores, strict=True))
    assert len(set(zip(*scores, strict=True))) == 12
    again = rich_feedback(
        variant=AUGMENTED_PROMPT, seeds=[7], lengths={"heatmaps": 1, "scores": 2, "texts": 0}
    )
    np.testing.assert_array_equal(again[0]["inputs"], examples[7]["inputs"])


@pytest.mark.parametrize("variant", feedback.VARIANTS)
def test_a_task_of_one_kind(variant):
    kinds = [feedback.ALIGNMENT]
    (example,) = rich_feedback(variant=variant, kinds=kinds)
    assert example["score_weights"].tolist() == [0, 1, 0, 0]
    assert example["heatmap_weights"].tolist() == [0, 0]
    assert not example["targets"].any()
    (example,) = rich_feedback(variant=variant, kinds=[feedback.MISALIGNMENT, "keywords"])
    assert not example["score_weights"].any()
    assert example["heatmap_weights"].tolist() == [0, 1]
    assert decoded(example["targets"]) == ["a red_0 star and one blue ring_0"]


def test_slots_are_drawn_from_the_kinds_of_the_task():
    kinds = [feedback.ALIGNMENT, feedback.OVERALL]
    examples = rich_feedback(
        variant=AUGMENTED_PROMPT, kinds=kinds, lengths={"scores": 1, "heatmaps": 0}, seeds=range(16)
    )
    tasks = {
        decoded(example["inputs"])[0].removesuffix(" a red star, and one blue ring") for example in examples
    }
    assert tasks == {"alignment score", "overall score"}
    assert all(example["score_weights"] == [1] for example in examples)
    # More slots than labelled kinds: the rest have no weight.
    for example in rich_feedback(
        variant=AUGMENTED_PROMPT, kinds=kinds, lengths={"scores": 3}, seeds=range(4)
    ):
        assert example["score_weights"].tolist() == [1, 1, 0]


def test_a_kind_that_is_none():
    with pytest.raises(errors.UserError, match="no kind 'beauty', only implausibility"):
        rich_feedback(variant=MULTI_HEAD, kinds=["beauty"])


def test_a_missing_score_has_no_weight():
    missing = {feedback.SCORE_FIELDS[feedback.OVERALL]: np.float32(np.nan)}
    (example,) = rich_feedback(variant=MULTI_HEAD, example=record(**missing))
    assert example["score_weights"].tolist() == [1, 1, 1, 0]
    assert example["scores"].tolist() == [0, 0.25, 0.5, 0]


def test_no_slots_of_a_kind():
    (example,) = rich_feedback(variant=AUGMENTED_PROMPT, lengths={"heatmaps": 0, "scores": 0})
    assert decoded(example["inputs"]) == ["misaligned keywords a red star, and one blue ring"]
    assert example["heatmaps"].shape == (0, 8, 8)
    assert example["scores"].shape == (0,)


@pytest.mark.parametrize("variant", feedback.VARIANTS)
def test_labels_that_do_not_fit_weigh_nothing(variant):
    (example,) = rich_feedback(variant=variant, example=record(**{feedback.KEYWORDS_FIELD: "1 0"}))
    assert not example["targets"].any()
    assert example["texts"].tolist() == [b""]
    assert example["heatmap_weights"].all()


@pytest.mark.parametrize(
    ("lengths", "variant", "message"),
    [
        ({"scores": 2}, MULTI_HEAD, r"'scores'\] is 2, but the multi-head variant.* 0 or 4"),
        ({"heatmaps": 3}, AUGMENTED_PROMPT, r"'heatmaps'\] must be 0 to 2, got 3"),
        ({"texts": -1}, AUGMENTED_PROMPT, r"'texts'\] must be 0 to 1, got -1"),
        ({"inputs": 6}, AUGMENTED_PROMPT, r"'inputs'\] must be at least 7"),
        ({"image": 64.0}, MULTI_HEAD, r"IMAGE_SIDE, .*'image'\], must be a whole number above 0, got 64.0"),
        ({"image": -64}, MULTI_HEAD, "IMAGE_SIDE, .* above 0, got -64"),
        ({"inputs": "a"}, MULTI_HEAD, "TEXT_LENGTH, .* got 'a'"),
        ({"targets": None}, MULTI_HEAD, "TARGET_LENGTH, .* got None"),
        ({"texts": True}, MULTI_HEAD, r"NUM_TEXTS, .*'texts'\], must be a whole number, got True"),
        ({"foo": 1}, MULTI_HEAD, "has an unknown 'foo', only image, inputs"),
    ],
)
def test_lengths_that_make_no_sense(lengths, variant, message):
    with pytest.raises(errors.UserError, match=message):
        preprocessors.slots_of({**LENGTHS, **lengths}, variant)


def test_missing_lengths():
    with pytest.raises(errors.UserError, match="there is no 'image'"):
        preprocessors.slots_of({"inputs": 8}, variant=MULTI_HEAD)
    with pytest.raises(errors.UserError, match="there is no 'image'"):
        preprocessors.slots_of(None, variant=MULTI_HEAD)


def test_images_of_another_size_and_their_heatmaps():
    big = record(
        **{feedback.IMAGE_FIELD: consolidate.encode_png(np.full((32, 32, 3), 9, np.uint8))},
        **{
            field: consolidate.encode_png(np.full((16, 16), 50, np.uint8))
            for field in feedback.HEATMAP_FIELDS.values()
        },
    )
    (example,) = rich_feedback(variant=MULTI_HEAD, example=big)
    np.testing.assert_array_equal(example["image"], np.full((8, 8, 3), 9))
    np.testing.assert_array_equal(example["heatmaps"], np.full((2, 8, 8), 50))


def test_letterboxed_images_have_a_box():
    gin.bind_parameter("richhf_jax.augmentation.show.fit", "letterbox")
    wide = record(**{feedback.IMAGE_FIELD: consolidate.encode_png(np.full((16, 32, 3), 9, np.uint8))})
    (example,) = rich_feedback(variant=MULTI_HEAD, example=wide)
    assert example["image_box"].tolist() == [2, 0, 6, 8]
    for pixels in (example["image"], *example["heatmaps"]):
        assert pixels[2:6].all()
        assert not pixels[:2].any()
        assert not pixels[6:].any()
    (caption,) = captions(variant=MULTI_HEAD, example=wide)
    np.testing.assert_array_equal(caption["image_box"], example["image_box"])


def test_heatmaps_that_no_slot_uses_are_not_decoded():
    broken = record(**dict.fromkeys(feedback.HEATMAP_FIELDS.values(), b"no image"))
    rich_feedback(variant=AUGMENTED_PROMPT, lengths={"heatmaps": 0}, example=broken)
    with pytest.raises(tf.errors.InvalidArgumentError, match="Unknown image file format"):
        rich_feedback(variant=AUGMENTED_PROMPT, example=broken)
    examples = rich_feedback(variant=AUGMENTED_PROMPT, seeds=range(4), lengths={"heatmaps": 1})
    kinds = {decoded(example["inputs"])[0].split()[0]: seed for seed, example in enumerate(examples)}
    for kind, seed in kinds.items():
        (other,) = set(feedback.HEATMAPS) - {kind}
        broken = record(**{feedback.HEATMAP_FIELDS[other]: b"no image"})
        rich_feedback(variant=AUGMENTED_PROMPT, seeds=[seed], lengths={"heatmaps": 1}, example=broken)
    assert len(kinds) == 2


def test_images_are_augmented_where_the_example_says_so():
    (plain,) = rich_feedback(variant=MULTI_HEAD)
    for marks in ({}, {preprocessors.AUGMENT: True}):
        examples = rich_feedback(variant=MULTI_HEAD, seeds=range(12), example=record(**marks))
        changed = [(example["image"] != plain["image"]).any() for example in examples]
        assert any(changed) == bool(marks)
        assert not all(changed)


def caption_record():
    fields = (feedback.FILENAME_FIELD, feedback.IMAGE_FIELD, feedback.PROMPT_FIELD)
    return {field: record()[field] for field in fields}


def test_caption_without_hints():
    (example,) = captions(variant=MULTI_HEAD, shown_share=0.0, example=caption_record())
    assert decoded(example["inputs"]) == ["caption"]
    assert decoded(example["targets"]) == ["a red star, and one blue ring"]
    assert example["heatmaps"].shape == (2, 8, 8)
    for name in ("heatmaps", "heatmap_weights", "scores", "score_weights"):
        assert not example[name].any()
    assert example["scores"].shape == (4,)


def test_caption_with_hidden_words():
    examples = captions(variant=MULTI_HEAD, shown_share=1.0, seeds=range(100), example=caption_record())
    words = ["a", "red", "star,", "and", "one", "blue", "ring"]
    hidden = []
    for example in examples:
        (text,) = decoded(example["inputs"])
        task, *shown = text.split()
        assert task == "caption"
        assert all(s in (w, preprocessors.MASK) for s, w in zip(shown, words, strict=True))
        hidden.append(shown.count(preprocessors.MASK))
    # Uniform over the number of hidden words, as the probability is uniform.
    assert min(hidden) == 0
    assert max(hidden) == 7
    assert 3.0 < np.mean(hidden) < 4.0
    assert np.std(hidden) > 1.9


def test_share_of_captions_with_hints():
    examples = captions(variant=MULTI_HEAD, shown_share=0.3, seeds=range(300), example=caption_record())
    shown = [decoded(example["inputs"]) != ["caption"] for example in examples]
    assert 0.22 < np.mean(shown) < 0.38


def test_captions_in_the_augmented_prompt_variant():
    (example,) = captions(variant=AUGMENTED_PROMPT, shown_share=0.0, example=caption_record())
    assert decoded(example["inputs"]) == [""] * 6 + ["caption"]
    expected = rich_feedback(variant=AUGMENTED_PROMPT)[0]
    assert shapes(example) == shapes(expected)


def shapes(example):
    return {k: (v.shape, v.dtype) for k, v in example.items() if isinstance(v, np.ndarray)}


@pytest.mark.parametrize("variant", feedback.VARIANTS)
def test_flawed_captions(variant):
    examples = flawed_captions(variant=variant, seeds=range(12), example=caption_record())
    (expected,) = rich_feedback(variant=variant)
    prompts = feedback.task_prompts(variant, "a red star, and one blue ring")
    flawed = [example["heatmaps"][0].any() for example in examples]
    assert 0 < sum(flawed) < 12
    for example, is_flawed in zip(examples, flawed, strict=True):
        assert shapes(example) == shapes(expected)
        assert decoded(example["inputs"]) == prompts
        # 0 is implausibility.
        assert example["heatmap_weights"].tolist() == [1.0, 0.0]
        assert not example["heatmaps"][1].any()
        assert (example["image"] != expected["image"]).any() == is_flawed
        for name in ("scores", "score_weights", "targets", "targets_words_cut"):
            assert not example[name].any()
        assert example["texts"].tolist() == [b""]


def test_flawed_captions_train_the_implausibility_heatmap_even_with_one_slot():
    run_them = functools.partial(
        flawed_captions, variant=AUGMENTED_PROMPT, seeds=range(8), lengths={"heatmaps": 1, "scores": 2}
    )
    for example in run_them(example=caption_record()):
        assert decoded(example["inputs"])[0] == "implausibility heatmap a red star, and one blue ring"
        assert example["heatmap_weights"].tolist() == [1.0]
        assert not example["score_weights"].any()
    # A wanted score gets a slot as well.
    for example in run_them(example=caption_record(), plausibility_weight=0.5):
        assert decoded(example["inputs"])[1] == "plausibility score a red star, and one blue ring"
        assert example["score_weights"].tolist() == [0.5, 0.0]


def test_plausibility_of_flawed_captions_follows_the_number_of_flaws():
    gin.bind_parameter("richhf_jax.flaws.paint.count_weights", (1, 1, 1))
    gin.bind_parameter("richhf_jax.flaws.paint.damages", ("static",))
    examples = flawed_captions(
        variant=MULTI_HEAD,
        seeds=range(20),
        example=caption_record(),
        plausibility_weight=0.5,
        clean_plausibility=0.9,
        flaw_cost=0.5,
    )
    plausibilities = set()
    for example in examples:
        plausibility, *others = example["scores"].tolist()
        assert others == [0.0] * 3
        assert example["score_weights"].tolist() == [0.5, 0.0, 0.0, 0.0]
        assert example["heatmaps"][0].any() == (plausibility < 0.9 - 1e-6)
        plausibilities.add(round(plausibility, 3))
    assert plausibilities == {0.9, 0.4, 0.0}


@pytest.mark.parametrize(
    ("prompt", "may_flip"),
    [
        ("a star left of a ring", False),
        ("Right, a ring\nand a star", False),
        ("the LEFTMOST ring", False),
        ("an upright ring in bright light", True),
        ("", True),
    ],
)
def test_prompts_with_sides_are_not_mirrored(prompt, may_flip):
    settings = ["augmentation.move.flip_probability = 1.0", "augmentation.move.shift = 0.0"]
    files = ["models/rahf_tiny.gin", "augmentation/geometric.gin"]
    gin_utils.parse_gin_flags(gin_utils.DEFAULT_SEARCH_PATHS, files, settings)
    heatmap = consolidate.encode_png(np.arange(64, dtype=np.uint8).reshape(8, 8))
    example = record(**dict.fromkeys(feedback.HEATMAP_FIELDS.values(), heatmap))
    example |= {feedback.PROMPT_FIELD: prompt, preprocessors.SEED: tf.constant([0, 1], tf.int64)}
    pictures = functools.partial(preprocessors._pictures, kinds=tf.range(2), side=8)
    plain, augmented = pictures(example), pictures(example | {preprocessors.AUGMENT: True})
    for name, width in (("image", 1), ("heatmaps", 2)):
        expected = np.flip(plain[name], width) if may_flip else plain[name]
        np.testing.assert_array_equal(augmented[name], expected)


def test_blind_to_the_image(monkeypatch):
    monkeypatch.setattr(preprocessors, "blind", functools.partial(preprocessors.blind, to="image"))
    (example,) = rich_feedback(variant=MULTI_HEAD)
    assert not example["image"].any()
    assert decoded(example["inputs"]) == ["a red star, and one blue ring"]
    assert example["heatmaps"].any()


def test_blind_to_the_prompt(monkeypatch):
    monkeypatch.setattr(preprocessors, "blind", functools.partial(preprocessors.blind, to="prompt"))
    (example,) = rich_feedback(variant=AUGMENTED_PROMPT)
    assert decoded(example["inputs"])[0] == "implausibility heatmap"
    assert decoded(example["targets"]) == ["a red_0 star and one blue ring_0"]
    assert example["image"].any()
    (caption,) = captions(variant=MULTI_HEAD, shown_share=1.0, example=caption_record())
    assert "star" not in decoded(caption["inputs"])[0]


def test_blind_to_something_else():
    with pytest.raises(errors.UserError, match=r"blind.to must be .* got 'words'"):
        preprocessors.blind(tf.data.Dataset.from_tensors(record()), to="words")


def test_seeds_of_stock_seqio():
    dataset = tf.data.Dataset.range(5).map(lambda n: {"n": n})
    with seqio.map_seed_manager(3):
        first = [e[preprocessors.SEED] for e in preprocessors.add_seed(dataset).as_numpy_iterator()]
    assert first[0].shape == (2,)
    assert len({tuple(seed) for seed in first}) == 5
