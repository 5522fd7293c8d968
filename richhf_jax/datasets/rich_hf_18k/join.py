"""Labels' images and prompts, from a source's shards into WORK_DIR/parts: one file a shard.

A part appears when its shard is finished: a killed run is taken up behind the last finished shard.
"""

import contextlib
import dataclasses
import fcntl
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping

import pyarrow as pa
import pyarrow.parquet as pq
import tqdm

from richhf_jax import errors, feedback, writing
from richhf_jax.datasets.rich_hf_18k.labels import write_json
from richhf_jax.datasets.rich_hf_18k.sources import BadShard, Row, Shard, Source
from richhf_jax.inputs import images

UID = "uid"
SCHEMA = pa.schema({UID: pa.string(), feedback.PROMPT_FIELD: pa.string(), feedback.IMAGE_FIELD: pa.binary()})
# Images gathered before they are written to a part.
_ROW_GROUP_BYTES = 32 << 20
_NOTES = b"richhf_jax"


@dataclasses.dataclass
class Notes:
    """What a part says beside its rows.

    Attributes:
      shard: name of the shard.
      size, version: the shard's, when it was read.
      bad: why it wasn't read to its end; then a later run reads it again.
      undecodable: (uid, what is wrong and where) of images that weren't taken.
      other_prompts: (uid, where and which) of rows with another prompt than the one that was taken.
      repeated: rows of images that had been found before.
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
    """How far the join has come.

    Attributes:
      prompts: uid -> prompt of the images that were found.
      notes: of all parts, by the shard's name.
    """

    prompts: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: dict[str, Notes] = dataclasses.field(default_factory=dict)


def parts(work_dir: pathlib.Path) -> list[pathlib.Path]:
    """The finished parts."""
    return sorted((work_dir / "parts").glob("*.parquet"))


@contextlib.contextmanager
def locked(work_dir: pathlib.Path) -> Iterator[None]:
    """Keeps other processes from joining into the same folder; ends with the process, however that ends.

    Raises:
      errors.UserError: another process does so now.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    with (work_dir / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise errors.UserError(f"{work_dir}: another process is at work here") from None
        yield


def check_source(source: Source, work_dir: pathlib.Path) -> None:
    """Keeps the images of different sources apart.

    Raises:
      errors.UserError: `work_dir` holds images of another source.
    """
    path = work_dir / "source.json"
    known = json.loads(path.read_text()) if path.exists() else None
    if known == source.description:
        return
    if known is None or not parts(work_dir):
        write_json(path, source.description)
    else:
        raise errors.UserError(
            f"{work_dir} holds a join with another source.\n"
            f"    then: {known}\n    now:  {source.description}\n"
            "Give another --work_dir, or delete this one to begin again."
        )


def join(source: Source, splits: Mapping[str, str], work_dir: pathlib.Path) -> State:
    """Looks for images in every shard that may have some, until none is missing.

    A row group's images are in memory at most, one after the other. Of several rows with the same image, the
    first good one counts, by the order of shards, of row groups, and of image columns in them. A shard that
    is cut off or corrupt gives what can be read of it, and the others are read nevertheless.

    Args:
      source: of images and prompts.
      splits: uid -> split of the labels, of each image that is wanted.
      work_dir: as `check_source` found it.

    Raises:
      errors.UserError: a shard isn't of the source's form, or can't be read now.
    """
    (work_dir / "parts").mkdir(exist_ok=True)
    shards = source.shards()
    state = _resume(shards, work_dir)
    if not shards and not state.notes:
        raise errors.UserError(f"{source.description}: there is no such path, or no shard or image in it")
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
    """What finished parts hold. One whose shard has changed is deleted, so that the shard is read again."""
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
            tqdm.tqdm.write(f"{shard.name} {reason}: it is read again", file=sys.stderr)
            path.unlink()
            continue
        state.notes[notes.shard] = notes
        table = part.read(columns=[UID, feedback.PROMPT_FIELD])
        columns = (table[name].to_pylist() for name in table.column_names)
        state.prompts.update(zip(*columns, strict=True))
    return state


def _read_shard(source, shard: Shard, splits, missing: set[str], state: State, work_dir, bar) -> None:
    """Reads a shard and writes its part; until that is finished, `missing` and `state` stay as they are."""
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
    """The image of a row, or None and a note why not."""
    try:
        if not (row.prompt or "").strip():
            raise images.ImageError("no prompt beside it")
        return images.checked(row.image or b"")
    except images.ImageError as error:
        notes.undecodable.append((row.uid, f"{row.where}: {error}"))
        return None


class _PartWriter:
    """Writes rows to a part, some at a time."""

    def __init__(self, path: pathlib.Path):
        # Images are compressed as they are.
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
