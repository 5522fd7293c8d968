"""Trains the small SentencePiece model that the tasks use by default.

    python -m tasks.train_vocabulary [OUT.model]

writes `tasks/sentencepiece_small.model` again, with the same pieces on every machine. Every word of the
synthetic prompts and of the task strings is one piece, and so is the misaligned suffix `_0`. Text without a
piece is spelled in characters or bytes, so that any text (other scripts, emoji) comes back exactly.
"""

import argparse
import io
import tempfile
from collections.abc import Sequence

import sentencepiece

from richhf_jax import errors, feedback, preprocessors, writing
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
    parser.add_argument("out", nargs="?", default=vocabulary.SMALL_MODEL, metavar="OUT.model")
    path = parser.parse_args(arguments).out
    with writing.explained_disk_errors(path):
        writing.write(path, train())
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
