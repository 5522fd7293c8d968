"""Copies the labels' images and prompts from a source's shards into WORK_DIR/parts, one file per shard.

A part appears when its shard is finished. After a kill, the next run continues behind the last one.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.parquet as pq
import tqdm
from etils import epath

from richhf_jax import errors, feedback, foreign_text, writing
from richhf_jax.datasets.rich_hf_18k.labels import write_json
from richhf_jax.datasets.rich_hf_18k.sources import BadShard, Row, Shard, Source
from richhf_jax.inputs import images

UID = "uid"
SCHEMA = pa.schema({UID: pa.string(), feedback.PROMPT_FIELD: pa.string(), feedback.IMAGE_FIELD: pa.binary()})
# A row group of a part is written when its images have this size.
_ROW_GROUP_BYTES = 32 << 20
_NOTES = b"richhf_jax"


@dataclasses.dataclass
class Notes:
    """Notes on a shard, kept in its part.

    Attributes:
      shard: name of the shard.
      size, version: the shard's size and version when it was read.
      bad: why the shard couldn't be read to its end, or ''. A later run reads a bad shard again.
      undecodable: (uid, what is wrong and where) of images that weren't taken.
      other_prompts: (uid, where and which) of rows whose prompt isn't the one that was taken.
      repeated: number of rows whose image had been found before.
    """

    shard: str
    size: int
    version: str
    bad: str = ""
    undecodable: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    other_prompts: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    repeated: int = 0


@dataclasses.dataclass
class State:
    """Progress of the join.

    Attributes:
      prompts: uid -> prompt of the images that were found.
      notes: shard's name -> notes of its part.
    """

    prompts: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: dict[str, Notes] = dataclasses.field(default_factory=dict)


def parts(work_dir: pathlib.Path) -> list[pathlib.Path]:
    """Lists the finished parts."""
    return sorted((work_dir / "parts").glob("*.parquet"))


def check_source(source: Source, work_dir: pathlib.Path) -> None:
    """Checks that the folder has no images of another source, and notes this one there.

    Raises:
      errors.UserError: `work_dir` holds images of another source.
    """
    path = work_dir / "source.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    if known == source.description:
        return
    if known is None or not parts(work_dir):
        write_json(path, source.description)
    else:
        raise errors.UserError(
            f"{work_dir} holds a join with another source.\n"
            f"    then: {known}\n    now:  {source.description}\n"
            "Give another --work_dir, or delete this one to start anew."
        )


def join(source: Source, splits: Mapping[str, str], work_dir: pathlib.Path) -> State:
    """Reads shards until no image is missing.

    At most one row group's images are in memory. If several rows have the same image, the first good one
    counts, in the order of shards, row groups and image columns. All that can be read of a shard is taken,
    also if it is cut off or corrupt; then the next shard follows.

    Args:
      source: gives images and prompts.
      splits: uid of each wanted image -> its labels' split.
      work_dir: folder of the join; `check_source` has been called for it.

    Raises:
      errors.UserError: a shard isn't of the source's form, or can't be read now.
    """
    (work_dir / "parts").mkdir(exist_ok=True)
    shards = source.shards()
    state = _resume(shards, work_dir)
    if not shards and not state.notes:
        raise errors.UserError(f"{source.description}: no such path, or no shard or image in it")
    missing = set(splits) - state.prompts.keys()
    with tqdm.tqdm(
        desc="looking for images",
        total=sum(shard.size for shard in shards),
        initial=sum(shard.size for shard in shards if shard.name in state.notes),
        unit="B",
        unit_scale=True,
        disable=None,
    ) as bar:
        for shard in shards:
            if shard.name in state.notes:
                continue
            target = bar.n + shard.size
            bar.set_postfix(found=len(splits) - len(missing), missing=len(missing))
            if any(splits[uid] in source.label_splits(shard) for uid in missing):
                _read_shard(source, shard, splits, missing, state, work_dir, bar)
            bar.update(target - bar.n)
    return state


def _resume(shards: list[Shard], work_dir: pathlib.Path) -> State:
    """Reads the finished parts. Deletes those whose shard is bad or has changed: it is read again."""
    state = State()
    known = {shard.name: shard for shard in shards}
    for path in (work_dir / "parts").glob("*.new"):
        path.unlink()
    for path in parts(work_dir):
        part = pq.ParquetFile(path)
        notes = Notes(**json.loads(part.metadata.metadata[_NOTES]))
        shard = known.get(notes.shard)
        if shard and (notes.bad or (shard.size, shard.version) != (notes.size, notes.version)):
            reason = "could not be read to its end" if notes.bad else "has changed since it was read"
            tqdm.tqdm.write(f"{shard.name} {reason}; reading it again", file=sys.stderr)
            path.unlink()
            continue
        state.notes[notes.shard] = notes
        table = part.read(columns=[UID, feedback.PROMPT_FIELD])
        columns = (table[name].to_pylist() for name in table.column_names)
        state.prompts.update(zip(*columns, strict=True))
    return state


def _read_shard(source, shard: Shard, splits, missing: set[str], state: State, work_dir, bar) -> None:
    """Reads a shard, writes its part, and only then changes `missing` and `state`."""
    notes = Notes(shard.name, shard.size, shard.version)
    left, prompts = set(missing), {}
    name = shard.name.replace("/", "--").removesuffix(".parquet")
    path = work_dir / "parts" / f"{name}.parquet"
    with writing.atomic(path) as new, _PartWriter(new) as writer:
        try:
            for row in source.rows(shard, splits, left, bar.update):
                if row.uid not in left:
                    prompt = prompts.get(row.uid, state.prompts.get(row.uid))
                    notes.repeated += 1
                    if row.prompt != prompt:
                        notes.other_prompts.append((row.uid, f"{row.where}: {row.prompt!r}"))
                elif image := _good_image(row, notes):
                    writer.write(row.uid, row.prompt, image)
                    prompts[row.uid] = row.prompt
                    left.discard(row.uid)
        except BadShard as error:
            notes.bad = str(error)
        writer.finish(notes)
    missing &= left
    state.prompts.update(prompts)
    state.notes[shard.name] = notes


def _good_image(row: Row, notes: Notes) -> bytes | None:
    """Returns a row's image, or notes why it isn't good and returns None."""
    try:
        if row.problem or foreign_text.is_blank(row.prompt or ""):
            raise images.ImageError(row.problem or "no prompt beside it")
        return images.checked(row.image or b"")
    except images.ImageError as error:
        notes.undecodable.append((row.uid, f"{row.where}: {error}"))
        return None


class _PartWriter:
    """Writes rows to a part, in row groups."""

    def __init__(self, path: epath.PathLike):
        # Nothing is compressed: images are already.
        self._writer = pq.ParquetWriter(path, SCHEMA, compression="none", use_dictionary=False)
        self._rows: list[dict] = []
        self._bytes = 0

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._writer.close()

    def write(self, uid: str, prompt: str, image: bytes) -> None:
        self._rows.append({UID: uid, feedback.PROMPT_FIELD: prompt, feedback.IMAGE_FIELD: image})
        self._bytes += len(image)
        if self._bytes > _ROW_GROUP_BYTES:
            self._flush()

    def finish(self, notes: Notes) -> None:
        self._flush()
        self._writer.add_key_value_metadata({_NOTES: json.dumps(dataclasses.asdict(notes))})

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, SCHEMA))
        self._rows, self._bytes = [], 0
