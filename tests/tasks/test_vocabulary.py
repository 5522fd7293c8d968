import pathlib

import gin
import pytest
import sentencepiece

from richhf_jax import errors, feedback, preprocessors
from richhf_jax.datasets import prompts
from tasks import providers, train_vocabulary, vocabulary

VOCABULARY = vocabulary.ConfiguredVocabulary()


def test_shipped_model_is_what_the_script_trains(tmp_path):
    train_vocabulary.main([str(tmp_path / "again.model")])
    again = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "again.model"))
    shipped = sentencepiece.SentencePieceProcessor(model_file=vocabulary.SMALL_MODEL)
    pieces = [[model.id_to_piece(i) for i in range(model.get_piece_size())] for model in (again, shipped)]
    assert pieces[0] == pieces[1]
    text = " ".join(train_vocabulary.words())
    assert again.encode(text) == shipped.encode(text)


def test_ids_are_t5s():
    model = vocabulary.get_vocabulary().tokenizer
    assert (model.pad_id(), model.eos_id(), model.unk_id(), model.bos_id()) == (0, 1, 2, -1)
    assert (VOCABULARY.pad_id, VOCABULARY.eos_id, VOCABULARY.unk_id) == (0, 1, 2)
    assert 256 < VOCABULARY.vocab_size <= train_vocabulary.VOCABULARY_SIZE


@pytest.mark.parametrize(
    "words",
    [
        [*prompts.SHAPES, *prompts.SHAPES.values()],
        [*prompts.COLOURS, *prompts.SIZES, *prompts.COUNT_WORDS.values()],
        " ".join([*prompts.OPENINGS, *prompts.LAST_JOINTS, prompts.ARTICLE]).split(),
        " ".join([*feedback.HEATMAP_TASK_STRINGS.values(), *feedback.SCORE_TASK_STRINGS.values()]).split(),
        [feedback.CAPTION_TASK_STRING, *feedback.KEYWORDS_TASK_STRING.split(), preprocessors.MASK],
    ],
)
def test_words_are_one_piece_each(words):
    assert [word for word in words if len(VOCABULARY.encode(word)) != 1] == []


def test_suffix_is_one_piece_behind_the_word():
    plain, marked = VOCABULARY.encode("a yellow cat"), VOCABULARY.encode("a yellow_0 cat")
    (suffix,) = set(marked) - set(plain)
    assert marked == [*plain[:2], suffix, *plain[2:]]
    assert vocabulary.get_vocabulary().tokenizer.id_to_piece(suffix) == feedback.MISALIGNED_SUFFIX


@pytest.mark.parametrize(
    "text",
    [
        "a yellow_0 cat, two red_0 circles.",
        "Photorealistic Castle (1984) at 100% - 'quoted'",
        "日本の猫_0 emoji 🎉_0 naïve Ünïcode",
        "ｆｕｌｌ width ① ﬁ",
        "<pad> </s> <unk> _ __ _0 _00",
    ],
)
def test_any_text_comes_back_exactly(text):
    ids = VOCABULARY.encode(text)
    assert VOCABULARY.unk_id not in ids
    assert VOCABULARY.decode(ids) == text
    assert VOCABULARY.decode_tf(VOCABULARY.encode_tf(text)).numpy().decode() == text


def test_tf_and_python_agree():
    text = 'a yellow_0 cat, "two" 猫'
    assert VOCABULARY.encode_tf(text).numpy().tolist() == VOCABULARY.encode(text)


def test_gin_names_another_model_for_the_registered_tasks(tmp_path):
    other = tmp_path / "other.model"
    with open(other, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["red green blue"] * 10),
            model_writer=file,
            vocab_size=20,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    registered = providers.OUTPUT_FEATURES["targets"].vocabulary
    before = registered.vocab_size
    gin.parse_config(f"VOCABULARY_PATH = '{other}'\ntasks.vocabulary.get_vocabulary.path = %VOCABULARY_PATH")
    assert registered.vocab_size < before
    assert registered.decode(registered.encode("red blue")) == "red blue"


def test_model_is_beside_the_code():
    assert pathlib.Path(vocabulary.SMALL_MODEL).parent == pathlib.Path(vocabulary.__file__).parent


@pytest.mark.parametrize("content", [None, b"", b"no model"])
def test_a_file_that_is_no_model(tmp_path, content):
    path = tmp_path / "bad.model"
    if content is not None:
        path.write_bytes(content)
    gin.bind_parameter("tasks.vocabulary.get_vocabulary.path", str(path))
    with pytest.raises(errors.UserError, match=r"bad.model: no SentencePiece model .* macro VOCABULARY"):
        VOCABULARY.encode("a")
