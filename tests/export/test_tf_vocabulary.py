import io
import json
import pathlib
import random
import subprocess
import sys

import pytest
import sentencepiece
import seqio
import tensorflow as tf
from sentencepiece import sentencepiece_model_pb2

from richhf_jax import errors, preprocessors
from richhf_jax.export import tf_vocabulary
from tasks import vocabulary

# One for each thing that SentencePiece treats in its own way, and neighbours to combine them with.
# fmt: off
FRAGMENTS = [
    "a", "the", "cat", "star", "ellow", "plausibility", "score", "_0", "_", "<x>", "star_0", "▁", "▁▁", "!",
    "é", "ﬁ", "ﬃx", "ＡＢＣ１２", "…", "½", "™", "¨", "´", ",", "-", "123", "Straße", "naïve", "привет", "😀",
    "<pad>", "</s>", "<unk>", "<0x41>", "東京", "カ", "ｶﾞ", "가", "\u1100\u1161\u11a8", "𝐀𝒷", "👩\u200d👧",
    " ", "  ", "\t", "\r\n", "\xa0", "\u2028", "\u200b", " \1 ", "\ufeff", "e\u0301", "\ufffd", "\0",
    "\U0010ffff",
]
WORDS = [
    "cat", "dogs", "yellow", "star", "café", "naïve", "Straße", "red", "running", "jumper", "über", "東京",
]
# fmt: on
SIGNATURE = [tf.TensorSpec([None], tf.string)]

# Run where tensorflow-text can't be imported.
SERVE = """
import json, sys
sys.modules["tensorflow_text"] = None
import tensorflow as tf
from tensorflow.python.framework import op_def_registry
folder, ops, texts = json.loads(sys.stdin.read())
unknown_ops = [[name for name in names if op_def_registry.get(name) is None] for names in ops]
served = tf.saved_model.load(folder)
ids = [tf.RaggedTensor.from_row_lengths(*served.encode(tf.constant(t, tf.string))).to_list() for t in texts]
print(json.dumps([unknown_ops, ids]))
"""


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

    return ["", " ", "▁", " ▁ ", "\u200b", "x" * 300, *(text() for _ in range(count))]


@pytest.fixture(scope="module")
def t5_like() -> bytes:
    return train(character_coverage=0.98)


@pytest.fixture(scope="module")
def stock(t5_like) -> tf_vocabulary.StockVocabulary:
    return tf_vocabulary.StockVocabulary(t5_like)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(None, id="shipped"),
        # As T5's: no bytes for unknown characters, NFKC.
        pytest.param({"character_coverage": 0.98}, id="unknown"),
        # Nothing between the unknown characters of one text and the next.
        pytest.param({"add_dummy_prefix": False, "normalization_rule_name": "identity"}, id="no prefix"),
        # Symbols that are found within words, across what would be normalised, and with a space before them.
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
def model(request) -> bytes:
    return train(**request.param) if request.param else pathlib.Path(vocabulary.SMALL_MODEL).read_bytes()


def op_names(function) -> list[str]:
    graph = function.get_concrete_function().graph.as_graph_def()
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    # A call of a function is named after it.
    return sorted({node.op for node in nodes} - {f.signature.name for f in graph.library.function})


def test_ids_are_those_of_sentencepiece(model):
    expected = sentencepiece.SentencePieceProcessor(model_proto=model)
    stock = tf_vocabulary.StockVocabulary(model)
    texts = random_texts(4000)
    ids = stock.encode_tf(tf.constant(texts))
    assert ids.dtype == tf.int32
    different = [
        (text, expected.encode(text), got)
        for text, got in zip(texts, ids.to_list(), strict=True)
        if expected.encode(text) != got
    ]
    assert not different, f"{len(different)}, e.g. {different[0]}"
    # In any company.
    assert [stock.encode_tf(tf.constant([text])).to_list()[0] for text in texts[:300]] == ids[:300].to_list()
    assert stock.encode_tf(tf.constant([], tf.string)).to_list() == []
    assert stock.eos_id == expected.eos_id()


def test_ties_are_decided_as_by_sentencepiece():
    proto = sentencepiece_model_pb2.ModelProto.FromString(train())
    for length, score in enumerate((-3.1, -4.7, -5.9), 1):
        proto.pieces.add(piece="q" * length, score=score)
    model = proto.SerializeToString()
    # "q" "qq" is as probable as "qq" "q".
    texts = ["a" * before + "q" * count for before in range(10) for count in range(80)]
    expected = sentencepiece.SentencePieceProcessor(model_proto=model).encode(texts)
    assert tf_vocabulary.StockVocabulary(model).encode_tf(tf.constant(texts)).to_list() == expected


def test_malformed_utf8_is_read_as_replacement_characters(stock):
    malformed = tf.constant([b"a \xff cat", b"\xe2\x96", b"the \xf0\x9f", b"red"])
    ids = stock.encode_tf(malformed)
    assert (
        ids.to_list()
        == stock.encode_tf(tf.constant(["a \ufffd cat", "\ufffd", "the \ufffd", "red"])).to_list()
    )


@pytest.mark.parametrize("length", [3, 9])
def test_the_preprocessors_encode_as_with_seqio(tmp_path, t5_like, stock, length):
    (tmp_path / "t5.model").write_bytes(t5_like)
    texts = tf.constant(random_texts(100))
    expected = preprocessors.encode(
        texts, length, seqio.SentencePieceVocabulary(str(tmp_path / "t5.model"), 0)
    )
    tokens, words_cut = tf.function(lambda texts: preprocessors.encode(texts, length, stock))(texts)
    assert tokens.shape == (texts.shape[0], length)
    assert tokens.numpy().tolist() == expected[0].numpy().tolist()
    assert int(words_cut) == int(expected[1]) > 0


class _Served(tf.Module):
    def __init__(self, stock: tf_vocabulary.StockVocabulary):
        super().__init__()
        self.vocabulary = stock

    @tf.function(input_signature=SIGNATURE)
    def encode(self, texts):
        ids = self.vocabulary.encode_tf(texts)
        return ids.flat_values, ids.row_lengths()


def test_a_saved_model_is_served_by_tensorflow_alone(tmp_path, t5_like, stock):
    served = _Served(stock)
    tf.saved_model.save(served, str(tmp_path / "saved"))
    with_text = seqio.SentencePieceVocabulary(vocabulary.SMALL_MODEL, 0)
    ops = [op_names(tf.function(v.encode_tf, SIGNATURE)) for v in (served.vocabulary, with_text)]
    texts = random_texts(50)
    result = subprocess.run(
        [sys.executable, "-c", SERVE],
        input=json.dumps([str(tmp_path / "saved"), ops, [texts, texts[:7], []]]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (unknown, unknown_with_text), ids = json.loads(result.stdout)
    assert unknown == []
    assert unknown_with_text, "the check finds the operations of tensorflow-text"
    expected = sentencepiece.SentencePieceProcessor(model_proto=t5_like).encode(texts)
    assert ids == [expected, expected[:7], []]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "bpe"}, "no unigram model"),
        ({"treat_whitespace_as_suffix": True}, "at the ends of words"),
        ({"remove_extra_whitespaces": False}, "keeps repeated whitespace"),
        ({"eos_id": -1}, "no piece for the end"),
    ],
)
def test_a_model_that_encodes_otherwise_is_refused(options, reason):
    with pytest.raises(errors.UserError, match=reason):
        tf_vocabulary.StockVocabulary(train(**options))


def test_what_is_no_model_is_refused():
    with pytest.raises(errors.UserError, match="no SentencePiece model"):
        tf_vocabulary.StockVocabulary(b"none")
