"""Shows what corruption makes of a data set's captions."""

from collections.abc import Iterable, Iterator

import tensorflow as tf

from richhf_jax import corruption, errors, feedback, foreign_text, word_table


def corrupted_captions(
    captions: Iterable[str], words: word_table.Words, count: int
) -> Iterator[tuple[str, str]]:
    """Makes captions wrong, the n-th by the seed [0, n]; leaves out those in which nothing can be exchanged.

    Args:
      captions: true captions.
      words: the table of words.
      count: number of corrupted captions, after which no more are read.

    Yields:
      The true caption, and the corrupted one's tokens, with the wrong ones in brackets: 'a [blue] star'.
    """
    corrupt = tf.function(
        lambda text, number: corruption.corrupt(text, tf.stack([tf.zeros_like(number), number]), words),
        input_signature=[tf.TensorSpec([], tf.string), tf.TensorSpec([], tf.int64)],
    )
    for number, caption in enumerate(captions):
        if not count:
            return
        corrupted = corrupt(caption, number)
        if not corrupted.possible:
            continue
        count -= 1
        tokens = feedback.tokenize_prompt(corrupted.prompt.numpy().decode())
        labels = feedback.parse_labels(corrupted.labels.numpy().decode())
        marked = [
            f"[{token}]" if label == feedback.MISALIGNED else token
            for token, label in zip(tokens, labels, strict=True)
        ]
        yield caption, " ".join(marked)


def format_corrupted(title: str, captions: Iterable[str], words: word_table.Words, count: int) -> str:
    """Lists `count` corrupted captions below their true ones.

    Raises:
      errors.UserError: there is none.
    """
    found = list(corrupted_captions(captions, words, count))
    if not found:
        raise errors.UserError(f"{title}: no caption has a word of the table that can be exchanged")
    lines = [f"{title}: {len(found)} corrupted captions, wrong words in brackets"]
    for number, (true, wrong) in enumerate(found, start=1):
        lines += [f"{number:4} {foreign_text.for_terminal(true)}", f"     {foreign_text.for_terminal(wrong)}"]
    return "\n".join(lines)
