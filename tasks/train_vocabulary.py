"""Trains the small vocabularies: the SentencePiece model that the tasks use by default, and one for CLIP.

    python -m tasks.train_vocabulary [OUT.model]
    python -m tasks.train_vocabulary --clip [OUT.json]

write `tasks/sentencepiece_small.model` or `tasks/clip_small.json` again, with the same pieces on every
machine. Every word of the synthetic prompts and of the task strings is one piece, and so is, for
SentencePiece, the misaligned suffix `_0`. Text without a piece is spelled in characters or bytes, so that any
text (other scripts, emoji) has tokens.
"""

import argparse
import io
import json
import tempfile
from collections.abc import Sequence

import sentencepiece
import tokenizers
from tokenizers import pre_tokenizers, trainers

from richhf_jax import clip_tokens, errors, feedback, preprocessors, writing
from richhf_jax.datasets import prompts
from tasks import vocabulary

VOCABULARY_SIZE = 512

# Frequent in prompts and captions. The synthetic scenes' words come from their own module.
_COMMON_WORDS = """
a an the and or of on in at to with without by for from is are as its no not one two three four five six
red green blue yellow orange purple pink white black gray grey brown cyan
small tiny little medium large big huge
picture image photo photograph drawing painting illustration background
left right above below top bottom behind front next beside under over between near
"""
_PUNCTUATION = ", . ! ? : ; \" ' - ( )"
# Tab, line feed and carriage return become spaces. Nothing else changes, so that text comes back as it was.
_NORMALIZATION = "9\t20\nA\t20\nD\t20\n"
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 _"


def words() -> list[str]:
    """Returns the words that must be one piece each, sorted."""
    task_strings = [*feedback.HEATMAP_TASK_STRINGS.values(), *feedback.SCORE_TASK_STRINGS.values()]
    task_strings += [feedback.KEYWORDS_TASK_STRING, feedback.CAPTION_TASK_STRING]
    scene_words = [*prompts.SHAPES.keys(), *prompts.SHAPES.values(), *prompts.COLOURS, *prompts.SIZES]
    scene_words += [*prompts.COUNT_WORDS.values(), prompts.ARTICLE, *prompts.OPENINGS, *prompts.LAST_JOINTS]
    texts = [_COMMON_WORDS, preprocessors.MASK, *task_strings, *scene_words]
    return sorted(set(" ".join(texts).split()))


def train() -> bytes:
    """Trains the model and returns its serialised proto."""
    model = io.BytesIO()
    # All words are equally frequent, each alone and before every punctuation mark: a word seen in a single
    # context is no candidate for a piece.
    corpus = [word + mark for word in words() for mark in ["", *_PUNCTUATION.split()]]
    corpus += "".join(_CHARACTERS.split())
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".tsv") as rules:
        rules.write(_NORMALIZATION)
        rules.flush()
        _train(corpus, model, rules.name)
    return model.getvalue()


def train_clip() -> bytes:
    """Trains CLIP's kind of vocabulary on the same words, each one piece; returns a tokenizer.json.

    The pieces of one byte come first, then those that end a word, then the merged ones; as in OpenAI's.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Given so, the first pieces have the same ids in every run, and ids decide between equal counts.
    first = [*alphabet, *(byte + "</w>" for byte in alphabet)]
    trainer = trainers.BpeTrainer(
        vocab_size=2**16, special_tokens=first, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(sorted({word.lower() for word in words()}), trainer)
    merges = [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]
    pieces = [*first, *map("".join, merges), clip_tokens.START, clip_tokens.END]
    return clip_tokens.build({piece: i for i, piece in enumerate(pieces)}, merges)


def _train(corpus: list[str], model: io.BytesIO, rules_path: str) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        model_type="unigram",
        vocab_size=VOCABULARY_SIZE,
        character_coverage=1.0,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_tsv=rules_path,
        user_defined_symbols=[feedback.MISALIGNED_SUFFIX],
        # T5's ids.
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )


@errors.command()
def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the model to the given path, or over the shipped one."""
    parser = argparse.ArgumentParser(prog="python -m tasks.train_vocabulary")
    parser.add_argument("out", nargs="?", metavar="OUT")
    parser.add_argument("--clip", action="store_true", help="CLIP's vocabulary, a tokenizer.json")
    given = parser.parse_args(arguments)
    path = given.out or (vocabulary.SMALL_CLIP if given.clip else vocabulary.SMALL_MODEL)
    with writing.explained_disk_errors(path):
        writing.write(path, train_clip() if given.clip else train())
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
