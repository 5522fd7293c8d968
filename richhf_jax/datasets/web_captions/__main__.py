"""Builds the TFDS data set web_captions from shards of images with alt-text.

Shards are TFRecord, webdataset (tar) or parquet files, even thousands of them, in any storage that fsspec
reaches: local paths, gs://, s3://, hf://, https://, ... (a storage may need a package of its own, which the
message names). They are streamed once. Pixels stay as they are; images of unusual forms (palette, CMYK, EXIF
rotation, ...) are encoded anew as PNG.

Samples are left out and counted if they have too many or too few words, another language or a small image.
Bad ones (no caption, a broken image, a garbled record) are listed in errors.jsonl, with file, record and
reason; the good ones of the same shard are kept. If a shard can't be read at all, the command finishes the
others and ends with exit code 1.

After a stop or a kill, the same command continues; it doesn't read finished shards again.
"""

import argparse
import dataclasses
import os
import pathlib
import sys
from collections.abc import Sequence

from richhf_jax import errors
from richhf_jax.datasets.web_captions import build, convert, shards


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m richhf_jax.datasets.web_captions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = convert.Options()
    shard_help = "path or URL; *, ?, [] and ranges such as {00000..01242} are expanded; may be repeated"
    parser.add_argument("--shards", action="append", required=True, metavar="PATTERN", help=shard_help)
    parser.add_argument(
        "--validation_shards",
        action="append",
        default=[],
        metavar="PATTERN",
        help="the same, for the split validation",
    )
    parser.add_argument("--data_dir", type=pathlib.Path, required=True, help="TFDS's folder, local")
    parser.add_argument(
        "--languages", type=_names, default=(), metavar="en,de", help="keep only these; default: all"
    )
    words = "words of a caption, separated by white space"
    parser.add_argument(
        "--min_words", type=int, default=default.min_words, help=f"fewest {words}; default: %(default)s"
    )
    parser.add_argument(
        "--max_words", type=int, default=default.max_words, help=f"most {words}; default: %(default)s"
    )
    parser.add_argument(
        "--min_side",
        type=int,
        default=default.min_side,
        help="fewest pixels of the shorter side; default: %(default)s",
    )
    for what in ("image", "caption", "language"):
        names = getattr(default, f"{what}_fields")
        parser.add_argument(
            f"--{what}_fields",
            type=_names,
            default=names,
            metavar="NAME,...",
            help=f"TFRecord feature, webdataset extension or parquet column: the first one that a sample has;"
            f" default: {','.join(names)}",
        )
    parser.add_argument(
        "--processes", type=int, default=len(os.sched_getaffinity(0)), help="default: one per core"
    )
    parser.add_argument("--skip_bad_shards", action="store_true", help="leave out shards that can't be read")
    return parser


@errors.command()
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    given = _parser().parse_args(arguments)
    given.languages = tuple(code.lower() for code in given.languages)
    options = convert.Options(**{f.name: getattr(given, f.name) for f in dataclasses.fields(convert.Options)})
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # Nothing here concerns a GPU.
    patterns = {"train": given.shards, "validation": given.validation_shards}
    try:
        inputs = {split: shards.find(named) for split, named in patterns.items() if named}
        print(build.build(inputs, given.data_dir, options, given.processes, given.skip_bad_shards))
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command continues from here.")


if __name__ == "__main__":
    main()
