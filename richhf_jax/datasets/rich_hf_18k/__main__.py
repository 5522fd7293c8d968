"""Builds the TFDS data set rich_hf_18k: RichHF-18K's labels, joined with images and prompts.

The labels are the published TFRecords, {train,dev,test}.tfrecord. Clone their repository with Git LFS:
https://github.com/google-research/google-research/tree/master/richhf_18k says where it is. The labels name
images of Pick-a-Pic v1, but hold neither images nor prompts. These come from one of

  --pick_a_pic=PATH
      Pick-a-Pic's parquet shards (their `data` folder). Only a part of the 190 GB is read: the columns of
      uids and captions, and the row groups that hold needed images.
  --joined=PATH
      A mirror in parquet with filename, image, prompt and the labels' fields. Without --labels, its own
      labels are taken; an overall score of 0 then counts as missing.
  --images=DIR --prompts=FILE
      Files <uid>.{jpg,png,webp,...}, and a CSV or JSON Lines file with uid and prompt.

A PATH is a local folder or an fsspec URL: hf://datasets/OWNER/NAME/data (for a gated data set, first run
`hf auth login`), gs://BUCKET/data (with gcsfs installed), https://...

After a stop or a kill, the same command continues behind the last finished shard. Shards of a local folder
may come and go between runs. A shard that is cut off or corrupt is named; what can be read of it is kept, and
the next run reads this shard again. If several rows have the same image, the first good one counts, in the
order of shards, row groups and image columns. If several records have the same image, the first one counts.

Records that can't be read, and images that are missing or can't be decoded, fail the build, unless
--allow-missing covers them; these records are then left out. The report is printed, and is report.json in the
data set's folder and in the work folder.

Disk: about 3 GB of images for the work folder, as much for the data set, and once more while it is built.
Memory: under 2 GB. The work folder is kept, so that nothing must be read again; after the build it may be
deleted.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # Nothing here concerns a GPU.

import pyarrow as pa
import tensorflow_datasets as tfds
from tensorflow_datasets.core import shuffle

from richhf_jax import errors, locking, writing
from richhf_jax.datasets.rich_hf_18k import join, labels, report, sources
from richhf_jax.datasets.rich_hf_18k.builder import RichHf18k

# TFDS would keep 1 GB in memory before it sorts on disk: with TensorFlow itself, that comes to 2 GB.
_SORTED_IN_MEMORY = 256 << 20


def make_source(options: argparse.Namespace) -> sources.Source:
    """Opens the source that the options name.

    Raises:
      errors.UserError: the options name none or several, or the source can't be read.
    """
    given = [name for name in ("pick_a_pic", "joined", "images") if getattr(options, name)]
    if len(given) != 1 or bool(options.images) != bool(options.prompts):
        raise errors.UserError("give one of --pick_a_pic, --joined, or --images with --prompts; see --help")
    if not options.labels and not options.joined:
        raise errors.UserError("--labels may be left out with --joined alone; see --help")
    if options.pick_a_pic:
        return sources.PickAPic(options.pick_a_pic)
    if options.joined:
        return sources.Joined(options.joined)
    return sources.Images(options.images, options.prompts)


def join_all(options: argparse.Namespace, work_dir: pathlib.Path) -> report.Report:
    """Collects labels and images in the work folder, and writes the report there.

    Raises:
      errors.UserError: the input is bad.
    """
    (work_dir / report.FILE).unlink(missing_ok=True)
    source = make_source(options)
    join.check_source(source, work_dir)
    if options.labels:
        index = labels.prepare_tfrecords(options.labels, work_dir)
    else:
        assert isinstance(source, sources.Joined)  # `make_source` wants labels with any other.
        index = labels.prepare(source.label_records(), source.label_inputs(), work_dir, zero_is_missing=True)
    result = report.make_report(index, join.join(source, index.splits, work_dir), source.problems)
    result.problem = problem_of(result, options.allow_missing)
    result.write(work_dir / report.FILE)
    return result


def problem_of(result: report.Report, allowed: int) -> str | None:
    """Returns why nothing may be built, or None."""
    if result.left_out > allowed:
        bad = ", or are bad themselves" if result.bad_records else ""
        return f"{result.left_out} records have no image or a broken one{bad}, and --allow-missing={allowed}"
    empty = [name for name, size in result.splits.items() if not size["with_image"]]
    return f"no image of {', '.join(empty)} was found" if empty else None


def build(options: argparse.Namespace) -> None:
    """Joins and builds, unless the data set is there already.

    Raises:
      errors.UserError: the input is bad, or more images are missing than allowed.
    """
    builder = RichHf18k(data_dir=options.data_dir)
    if builder.is_prepared():
        print(f"{builder.info.full_name} is in {builder.data_path} already; delete that to build it again")
        return
    work_dir = options.work_dir or options.data_dir / "downloads/manual" / builder.name
    with locking.held(work_dir, "--work_dir"):
        result = join_all(options, work_dir)
        print(result)
        if result.problem:
            raise errors.UserError(
                f"{result.problem}. Nothing was built; all lists are in {work_dir / report.FILE}.\n"
                "The images found are kept. Give the same command again, with the missing ones in place or a"
                " larger --allow-missing: it reads no finished shard again."
            )
        shuffle.MAX_MEM_BUFFER_SIZE = _SORTED_IN_MEMORY
        config = tfds.download.DownloadConfig(manual_dir=work_dir, try_download_gcs=False)
        builder.download_and_prepare(download_config=config)
    sizes = ", ".join(f"{split.num_examples} {name}" for name, split in builder.info.splits.items())
    print(f"{builder.info.full_name}: {sizes}; {builder.data_path}\n{work_dir} may be deleted")


@errors.command()
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m richhf_jax.datasets.rich_hf_18k",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--labels", type=pathlib.Path, metavar="DIR", help="folder of the three TFRecords of labels"
    )
    parser.add_argument(
        "--pick_a_pic", metavar="PATH", help="Pick-a-Pic v1: folder of parquet shards, or URL"
    )
    parser.add_argument("--joined", metavar="PATH", help="mirror with images and prompts: folder or URL")
    parser.add_argument("--images", metavar="DIR", help="folder of images: local, or URL")
    parser.add_argument(
        "--prompts", metavar="FILE", help="CSV or JSON Lines with uid and prompt; with --images"
    )
    parser.add_argument(
        "--data_dir", type=pathlib.Path, required=True, metavar="DIR", help="TFDS's folder, for the data set"
    )
    parser.add_argument(
        "--work_dir",
        type=pathlib.Path,
        metavar="DIR",
        help="folder for the images found so far; default: DATA_DIR/downloads/manual/rich_hf_18k",
    )
    parser.add_argument(
        "--allow-missing",
        type=int,
        default=0,
        metavar="N",
        help="build even if up to N records are bad, or have no image or a broken one; default: 0",
    )
    options = parser.parse_args(arguments)
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    # Unlike arrow's own pool, this one frees memory at once: 160 MB less for row groups with 96 MB of images.
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        with writing.explained_disk_errors(options.data_dir):
            build(options)
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command continues behind the last finished shard.")


if __name__ == "__main__":
    main()
