"""CLIP's tokens equal those of transformers, from either form of its files."""

import json
import pathlib
import random

import numpy as np
import pytest
import tensorflow as tf
import transformers

from richhf_jax import clip_tokens, errors, preprocessors
from richhf_jax.clip_tokens import END, START
from tasks import train_vocabulary, vocabulary

LENGTH = 77
# Split at "|": scripts, joined and composed characters, spaces, contractions, CLIP's own tokens.
SIGNS = [
    "😀",
    "👩\u200d👩\u200d👧",
    "🏳️\u200d🌈",
    "✨",
    "…",
    "™",
    "½",
    "²³",
    "№",
    "€",
    "¿",
    "«",
    "—",
    "\u200b",
    "\xad",
    "\ufeff",
    "\x00",
    "\x07",
    "\u2028",
    "\u3000",
    "\xa0",
    "\t",
    "\n",
    "\r\n",
    "猫",
    "日本語",
    "한국어",
    "ｆｕｌｌ",
    "ＷＩＤＴＨ",
    "①",
    "ﬁ",
    "İstanbul",
    "ẞ",
    "straße",
    "ΑΣ",
    "naïve",
    "naïve",
    "é",
    "ʼn",
    "हिन्दी",
    "العربية",
    "ไทย",
    "it's",
    "don't",
    "we're",
    "I've",
    "I'm",
    "she'll",
    "he'd",
    "IT'S",
    "Don'T",
    "''s",
    "'s",
    "'",
    "12",
    "3.14",
    "1,000",
    "10th",
    "_0",
    "a_b",
    "x-y",
    "(!)",
    "!!!",
    "...",
    "#",
    "&amp;",
    "</w>",
    "\ud7ff",
    "𝔘𝔫𝔦",
    "𓀀",
]
SIGNS += [START, END, START.upper(), "<|end", "of|>", "text|>"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Writes the shipped small vocabulary as vocab.json and merges.txt."""
    folder = tmp_path_factory.mktemp("clip")
    content = json.loads(train_vocabulary.train_clip())
    (folder / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    merges = [" ".join(pair) for pair in content["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return folder


@pytest.fixture(scope="module")
def prompts():
    """Draws 10,000 prompts of words, signs and any characters; every hundredth has 300 words."""
    drawn, words = random.Random(0), train_vocabulary.words()

    def part():
        kind = drawn.random()
        if kind < 0.5:
            return drawn.choice([str, str.upper, str.title])(drawn.choice(words))
        if kind < 0.9:
            return drawn.choice(SIGNS)
        return "".join(
            chr(drawn.choice([drawn.randrange(0x300), drawn.randrange(0xE000, 0x30000)])) for _ in range(3)
        )

    def prompt(i):
        count = 300 if i % 100 == 0 else drawn.randrange(12)
        return "".join(part() + drawn.choice([" ", " ", " ", "", "  ", ","]) for _ in range(count))

    return [prompt(i) for i in range(10_000)]


def test_tokens_are_those_of_transformers(files, prompts):
    theirs = transformers.CLIPTokenizer.from_pretrained(files)
    rows = theirs(prompts, truncation=True, max_length=LENGTH)["input_ids"]
    expected = np.array([row + [0] * (LENGTH - len(row)) for row in rows])
    older = clip_tokens.read(files)
    ids, words_cut = older.encode(prompts, LENGTH)
    np.testing.assert_array_equal(ids, expected)
    # Too long, or with something behind the first end.
    whole = theirs(prompts)["input_ids"]
    ends = [row.index(older.end_id) for row in whole]
    cut = [
        len(row) > LENGTH or end < len(row) - 2 or (end == 1 and len(row) == 3)
        for row, end in zip(whole, ends, strict=True)
    ]
    assert (words_cut > 0).tolist() == cut
    assert all(cut[::100])
    assert sum(cut) > sum(len(row) > LENGTH for row in whole) > 0


def test_both_forms_of_the_files_are_one(files, prompts, tmp_path):
    theirs = transformers.CLIPTokenizer.from_pretrained(files)
    theirs.save_pretrained(tmp_path)
    older, newer = clip_tokens.read(files), clip_tokens.read(tmp_path)
    assert newer.content == older.content
    ids = older.encode(prompts[:1000], LENGTH)[0]
    np.testing.assert_array_equal(newer.encode(prompts[:1000], LENGTH)[0], ids)
    again = clip_tokens.ClipTokens(older.content)
    np.testing.assert_array_equal(again.encode(prompts[:1000], LENGTH)[0], ids)


NFC = {"type": "NFC"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
TRUNCATION = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}


@pytest.mark.parametrize(
    "rules",
    [
        {"normalizer": None},
        {"normalizer": NFC},
        {"pre_tokenizer": None},
        {"pre_tokenizer": BYTES},
        {"added_tokens": []},
        {"truncation": TRUNCATION},
        {"model": {"end_of_word_suffix": None}},
        {"model": {"dropout": 0.5}},
        {"model": {"unk_token": None}},
    ],
)
def test_rules_in_a_file_are_not_clips(rules, files, prompts):
    """transformers' CLIPTokenizer reads none of them either."""
    own = clip_tokens.read(files)
    content = json.loads(own.content)
    model = content["model"] | rules.get("model", {})
    tokens = clip_tokens.ClipTokens(json.dumps(content | rules | {"model": model}).encode())
    ids = own.encode(prompts[:100], LENGTH)[0]
    np.testing.assert_array_equal(tokens.encode(prompts[:100], LENGTH)[0], ids)
    assert tokens.is_same(own)


def test_tokens_that_a_file_adds_are_found_first(files, prompts, tmp_path):
    theirs = transformers.CLIPTokenizer.from_pretrained(files, pad_token="!")
    theirs.save_pretrained(tmp_path)
    tokens = clip_tokens.read(tmp_path)
    rows = theirs(prompts[:1000], truncation=True, max_length=LENGTH)["input_ids"]
    expected = np.array([row + [0] * (LENGTH - len(row)) for row in rows])
    np.testing.assert_array_equal(tokens.encode(prompts[:1000], LENGTH)[0], expected)
    without = clip_tokens.read(files)
    assert (without.encode(prompts[:1000], LENGTH)[0] != expected).any()
    assert not tokens.is_same(without)


@pytest.mark.parametrize(
    ("text", "length", "pieces", "cut"),
    [
        ("a red star", 5, 3, 0),
        ("a red star", 4, 2, 1),
        ("a red-star", 4, 2, 1),  # a, red: the word is cut in its middle
        ("red-star a", 4, 2, 2),
        ("", 4, 0, 0),
        ("  a  ", 3, 1, 0),
        ("red 猫", 4, 2, 1),  # two of three bytes would be no character
        # CLIP reads nothing behind an end; a start is a token like others.
        (f"a {END} red-star a", 9, 6, 2),
        (f"a red{END}star {END} a", 12, 6, 3),
        (f"a red {END}", 9, 3, 0),
        (END, 9, 1, 1),
        (f" {END} red star", 9, 3, 3),
        (f"a {END} red star", 5, 3, 2),
        (f"a red star {END}", 5, 3, 1),
        (f"a {END.upper()} red", 20, 14, 0),
        (f"{START} a {START} red", 9, 4, 0),
        (f"{START} a {START} red", 5, 3, 1),
    ],
)
def test_words_that_are_cut(text, length, pieces, cut):
    tokens = clip_tokens.read(vocabulary.SMALL_CLIP)
    ids, words_cut = tokens.encode([text], length)
    assert (words_cut.tolist(), ids[0, 0], ids[0, pieces + 1]) == ([cut], tokens.start_id, tokens.end_id)
    assert not ids[0, pieces + 2 :].any()


def test_decoding_gives_what_clip_reads():
    tokens = clip_tokens.read(vocabulary.SMALL_CLIP)
    ids = tokens.encode(["Two RED circles, left of naïve 猫 it's"], LENGTH)[0][0]
    assert tokens.decode(ids.tolist()) == "two red circles , left of naïve 猫 it 's"


def test_the_shipped_vocabulary_is_what_the_script_trains(tmp_path):
    train_vocabulary.main(["--clip", str(tmp_path / "again.json")])
    tokens = clip_tokens.read(tmp_path / "again.json")
    shipped = pathlib.Path(vocabulary.SMALL_CLIP).read_bytes()
    assert (tmp_path / "again.json").read_bytes() == shipped == tokens.content
    ids = tokens.encode(train_vocabulary.words(), LENGTH)[0]
    assert (np.count_nonzero(ids, axis=1) == 3).all()
    # The end's is the highest id, as in OpenAI's: a text tower without `end_id` finds it.
    assert tokens.size == tokens.end_id + 1 == tokens.start_id + 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"tokenizer.json": "{}"}, "tokenizer.json is damaged, or no file of the tokenizers library"),
        ({"tokenizer.json": None}, "has no tokenizer.json, nor vocab.json and merges.txt"),
        ({"vocab.json": "[]", "merges.txt": ""}, "^[^ ]*/vocab.json is no JSON object"),
        (
            {"vocab.json": '{"a": 0}', "merges.txt": "a b"},
            "merges.txt is damaged, or doesn't belong to vocab.json",
        ),
        (
            {"vocab.json": '{"a": 0}', "merges.txt": ""},
            r"vocab.json isn't CLIP's: its vocabulary has no <\|start",
        ),
    ],
)
def test_damaged_files(tmp_path, damage, message):
    for name, content in damage.items():
        if content is not None:
            (tmp_path / name).write_text(content)
    with pytest.raises(errors.UserError, match=message):
        clip_tokens.read(tmp_path)


def rotated(model):
    pieces = [*model["vocab"]]
    model["vocab"] = dict(zip(pieces, [*range(1, len(pieces)), 0], strict=True))


def swapped(model):
    model["merges"][7:9] = model["merges"][8:6:-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model["merges"].clear(), r"'<\|startoftext\|>' has the id 772, .* of 0 merges"),
        (lambda model: model["merges"].pop(), r"'<\|startoftext\|>' has the id 772, and not 771"),
        (rotated, "'!' has the id 1, and not 0, as CLIP's order"),
        (swapped, "has the id 520, and not 519"),
        (
            lambda model: model.update(type="WordLevel", unk_token="!", merges=[]),
            r"'<\|startoftext\|>' has the id 772",
        ),
    ],
)
def test_ids_that_are_not_clips(change, message, files, tmp_path):
    """Writes vocabularies of the right size, with start and end."""
    content = json.loads(clip_tokens.read(vocabulary.SMALL_CLIP).content)
    change(content["model"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(errors.UserError, match=f"tokenizer.json isn't CLIP's, or is damaged: .*{message}"):
        clip_tokens.read(tmp_path)


def test_merges_that_are_cut_off(files, tmp_path):
    lines = (files / "merges.txt").read_text().splitlines()
    (tmp_path / "vocab.json").write_bytes((files / "vocab.json").read_bytes())
    # OpenAI's own file begins so.
    (tmp_path / "merges.txt").write_text("\n".join(['"bpe_simple_vocab_16e6.txt#version: 0.2', *lines[1:]]))
    whole = clip_tokens.read(tmp_path)
    assert whole.is_same(clip_tokens.read(files))
    assert whole.is_same(clip_tokens.ClipTokens(whole.content))
    (tmp_path / "merges.txt").write_text("\n".join(lines[:-30]))
    with pytest.raises(errors.UserError, match="vocab.json isn't CLIP's, or is damaged"):
        clip_tokens.read(tmp_path)


def test_the_end_must_be_the_one_at_which_a_network_pools():
    tokens = clip_tokens.read(vocabulary.SMALL_CLIP)
    for end_id in (None, 773):
        tokens.check_fits(774, end_id)
    with pytest.raises(errors.UserError, match="has 774 tokens, the model 775"):
        tokens.check_fits(775, 773)
    with pytest.raises(errors.UserError, match="ends a text with the id 773, the model looks for 5"):
        tokens.check_fits(774, 5)


def test_tasks_give_clips_tokens_where_gin_names_its_file(prompts):
    import gin

    configured = vocabulary.ConfiguredVocabulary()
    gin.bind_parameter("tasks.vocabulary.get_vocabulary.path", vocabulary.SMALL_CLIP)
    tokens = clip_tokens.read(vocabulary.SMALL_CLIP)
    assert configured.vocab_size == tokens.size
    assert configured.sp_model == tokens.content
    dataset = tf.data.Dataset.from_tensors(tf.constant(prompts[:3]))
    ((ids, words_cut),) = dataset.map(lambda texts: preprocessors.encode(texts, 20, configured))
    expected, cut = tokens.encode(prompts[:3], 20)
    np.testing.assert_array_equal(ids, expected)
    assert (words_cut, ids.dtype, words_cut.dtype) == (cut.max(), tf.int32, tf.int32)
    encoded = configured.encode("a red star")
    assert configured.encode_tf(tf.constant("a red star")).numpy().tolist() == encoded
    assert (
        configured.decode(encoded)
        == configured.decode_tf(tf.constant(encoded)).numpy().decode()
        == "a red star"
    )


def test_a_file_that_is_missing():
    message = (
        "nowhere.json can't be read: No such file .*Give the path of a tokenizer.json, or of a directory"
    )
    with pytest.raises(errors.UserError, match=message):
        vocabulary.get_vocabulary("nowhere.json")


def test_older_files_stand_for_their_directory(files):
    for name in ("vocab.json", "merges.txt"):
        assert clip_tokens.read(files / name).is_same(clip_tokens.read(files))


def test_files_that_contradict_each_other(files, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(clip_tokens.read(files).content)
    ids = json.loads((files / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(ids))
    assert clip_tokens.read(tmp_path).is_same(clip_tokens.read(files))
    ids["red</w>"], ids["star</w>"] = ids["star</w>"], ids["red</w>"]
    (tmp_path / "vocab.json").write_text(json.dumps(ids))
    message = "tokenizer.json and vocab.json give tokens different ids.*Take the"
    with pytest.raises(errors.UserError, match=message):
        clip_tokens.read(tmp_path)
