"""Describes a data set: scores, rater agreement, heatmaps, prompts, labels, images and problems.

    python -m richhf_jax.datasets.describe --dataset=rich_hf_18k --data_dir=DIR --split=train
    python -m richhf_jax.datasets.describe --labels train.tfrecord
    python -m richhf_jax.datasets.describe --raw RAW.jsonl --html=report.html
    python -m richhf_jax.datasets.describe --dataset=web_captions --data_dir=DIR --corrupted=50

Figures follow section 3.4 of "Rich Human Feedback for Text-to-Image Generation": score histograms (Fig. 2)
and the spread of an image's raters (Fig. 4; it needs raw ratings). For their mean, heatmaps of all shapes are
stretched to a square. Records are read one by one; raw ratings are all held in memory.

--corrupted describes nothing, but shows what the tasks of corrupted captions make of a data set's captions.
"""

import argparse
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

import sentencepiece
from etils import epath

from richhf_jax import errors, foreign_text, writing
from richhf_jax.datasets.describe import sources, text
from richhf_jax.datasets.describe.statistics import Record, Statistics


def token_counter(path: str) -> Callable[[str], int]:
    """Makes a function prompt -> number of tokens, end token included, of a SentencePiece model's file.

    Args:
      path: the model, local or gs://.

    Raises:
      errors.UserError: there is no such model.
    """
    try:
        vocabulary = sentencepiece.SentencePieceProcessor()
        vocabulary.LoadFromSerializedProto(epath.Path(path).read_bytes())
    except (OSError, RuntimeError) as error:
        raise errors.UserError(f"--vocabulary: {path}: no SentencePiece model: {error}") from None
    return lambda prompt: len(vocabulary.encode(prompt)) + 1


def describe(records: Iterator[Record], statistics: Statistics) -> dict:
    """Reads all records and returns `Statistics.summary`.

    Raises:
      errors.UserError: there is no record.
    """
    for record in records:
        statistics.add(record)
    summary = statistics.summary()
    if not summary["records"]:
        raise errors.UserError("there are no records")
    return summary


def _write(path: pathlib.Path, content: str | bytes) -> None:
    with writing.explained_disk_errors(path):
        writing.write(path, content)


def _outputs(options: argparse.Namespace, title: str, summary: dict) -> None:
    if options.json:
        content = {"source": title} | summary
        _write(options.json, json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False))
    if options.png:
        from richhf_jax.datasets.describe import figure  # Only a picture needs matplotlib.

        _write(options.png, figure.make_png(title, summary))
    if options.html:
        from richhf_jax.datasets.describe import page

        _write(options.html, page.make_page(title, summary))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m richhf_jax.datasets.describe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--dataset", metavar="NAME", help="built by TFDS, e.g. rich_hf_18k or synthetic_rich_hf/subtle"
    )
    source.add_argument(
        "--labels", nargs="+", type=pathlib.Path, metavar="FILE", help="RichHF-18K's TFRecord files"
    )
    source.add_argument("--raw", type=pathlib.Path, metavar="FILE", help="raw ratings, JSON Lines")
    parser.add_argument("--data_dir", metavar="DIR", help="TFDS's folder; default: ~/tensorflow_datasets")
    parser.add_argument("--split", default="train", help="split of --dataset; default: train")
    parser.add_argument(
        "--vocabulary", metavar="FILE", help="a SentencePiece model: prompts are measured in tokens, too"
    )
    parser.add_argument(
        "--length",
        type=int,
        metavar="TOKENS",
        help="count the prompts that have more tokens, end token included",
    )
    for name, what in (("json", "all figures"), ("png", "one picture"), ("html", "a self-contained page")):
        parser.add_argument(f"--{name}", type=pathlib.Path, metavar="FILE", help=f"also write {what}")
    parser.add_argument(
        "--corrupted", type=int, metavar="N", help="only print so many captions of --dataset made wrong"
    )
    parser.add_argument(
        "--words",
        choices=("english", "synthetic"),
        help="built-in table of words for --corrupted, without changes by gin files; default: synthetic for"
        " synthetic data sets, english for others",
    )
    return parser


def _print_corrupted(options: argparse.Namespace) -> None:
    from richhf_jax import word_table
    from richhf_jax.datasets import caption_words
    from richhf_jax.datasets.describe import corrupted  # TensorFlow takes seconds.

    synthetic = options.dataset.startswith("synthetic")
    table = caption_words.TABLES[options.words or ("synthetic" if synthetic else "english")]
    captions = sources.tfds_captions(options.dataset, options.data_dir, options.split)
    title = foreign_text.for_terminal(f"{options.dataset}, {options.split}")
    print(corrupted.format_corrupted(title, captions, word_table.Words(**table), options.corrupted))


@errors.command()
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.length is not None and not options.vocabulary:
        parser.error("--length needs --vocabulary")
    if options.corrupted is not None and (not options.dataset or options.corrupted < 1):
        parser.error("--corrupted needs --dataset, and a number above 0")
    if options.words and options.corrupted is None:
        parser.error("--words needs --corrupted")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # Nothing here concerns a GPU.
    if options.corrupted is not None:
        if options.json or options.png or options.html or options.vocabulary:
            parser.error("--corrupted only prints; leave out --json, --png, --html and --vocabulary")
        return _print_corrupted(options)
    for path in filter(None, (options.json, options.png, options.html)):
        writing.check_file(path)
    count_tokens = token_counter(options.vocabulary) if options.vocabulary else None
    if options.dataset is not None:
        title = f"{options.dataset}, {options.split}"
        records = sources.tfds_records(options.dataset, options.data_dir, options.split)
    elif options.labels:
        title, records = ", ".join(map(str, options.labels)), sources.label_records(options.labels)
    else:
        title, records = str(options.raw), sources.raw_records(options.raw)
    title = foreign_text.for_terminal(title)
    summary = describe(records, Statistics(count_tokens, options.length))
    print(text.format_summary(title, summary))
    _outputs(options, title, summary)


if __name__ == "__main__":
    main()
