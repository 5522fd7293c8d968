"""Inputs of models that read no text: every kind may lack prompts, and gives those that are there."""

import json

import pyarrow as pa
import pytest

from richhf_jax import inputs
from richhf_jax.inputs import archives
from tests.inputs.reading import read, user_error, write, write_parquet, write_tar

IMAGES = {"a.jpg": b"A", "b.jpg": b"B", "c.jpg": b"C", "d.jpg": b"D"}
# Of the second image there is no prompt at all; the third shows nothing, and the fourth isn't UTF-8.
PROMPTS = {"a.jpg": b" p ", "c.jpg": "\u200b \ufeff".encode(), "d.jpg": b"\xff"}
FOUND = {"a.jpg": (b"A", "p"), "b.jpg": (b"B", ""), "c.jpg": (b"C", "")}


def texts():
    return {name.replace("jpg", "txt"): prompt for name, prompt in PROMPTS.items()}


def rows():
    """Returns the rows of tables: JSON and Arrow hold no text that isn't UTF-8."""
    return [{"image": name, "prompt": PROMPTS.get(name)} for name in list(IMAGES)[:3]]


def decoded(row):
    return row | {"prompt": row["prompt"] and row["prompt"].decode()}


def written(folder, kind):
    """Writes the images and what prompts they have, and returns the paths to read."""
    write(folder, IMAGES)
    if kind == "csv":
        lines = [",".join((row["image"], (row["prompt"] or b"").decode())) for row in rows()]
        write(folder, {"t.csv": "\n".join(["image,prompt", *lines])})
    elif kind == "jsonl":
        lines = [{k: v for k, v in decoded(row).items() if v is not None} for row in rows()]
        write(folder, {"t.jsonl": "\n".join(map(json.dumps, lines))})
    elif kind in ("parquet", "embedded"):
        columns = {name: [decoded(row)[name] for row in rows()] for name in ("image", "prompt")}
        if kind == "embedded":
            columns["image"] = [{"bytes": IMAGES[name], "path": name} for name in columns["image"]]
        write_parquet(folder / "t.parquet", **columns)
        return [folder / "t.parquet"]
    elif kind == "tar":
        write_tar(folder / "t.tar", [*IMAGES.items(), *texts().items()])
    else:
        write(folder, texts())
        return [folder] if kind == "folder" else [folder / name for name in IMAGES]
    return [folder / f"t.{kind}"]


@pytest.mark.parametrize("kind", ["images", "folder", "csv", "jsonl", "parquet", "embedded", "tar"])
def test_prompts_that_are_there_are_given_and_others_are_empty(tmp_path, kind):
    paths = written(tmp_path, kind)
    found = read(*paths, needs_prompts=False)
    if kind == "tar":  # Its keys are the names without extensions; those without a text come last.
        assert list(found) == ["a", "c", "d", "b"]
        found = {f"{key}.jpg": value for key, value in found.items()}
    broken = found.pop("d.jpg", "the prompt isn't UTF-8")
    assert found == FOUND
    assert "the prompt isn't UTF-8" in broken
    # Where prompts are needed, all these are refused: "" is no prompt, and zero-width characters aren't.
    found = {key.removesuffix(".jpg"): value for key, value in read(*paths).items()}
    assert found.pop("a") == (b"A", "p")
    assert all(isinstance(message, str) for message in found.values())
    assert "the prompt is empty" in found["c"]


def test_a_prompt_of_zero_width_characters_is_empty(tmp_path):
    write(tmp_path, {"a.jpg": b"A"})
    assert user_error(tmp_path / "a.jpg", prompt="\u200b\u2060 ") == "--prompt: the prompt is empty"


@pytest.mark.parametrize("prompt", ["", " \n", "\u200b\u2060 "])
def test_a_blank_prompt_is_as_none_where_none_are_needed(tmp_path, prompt):
    write(tmp_path, {"a.jpg": b"A", "b.jpg": b"B", "b.txt": b"q", "t.csv": "image\na.jpg\n"})
    paths = [str(tmp_path / name) for name in ("a.jpg", "b.jpg", "t.csv")]
    given = inputs.Inputs(paths, prompt, needs_prompts=False)
    assert [record.load()[1] for record in given] == ["", "q", ""]


@pytest.mark.parametrize("kind", ["csv", "parquet", "bytes"])
def test_a_table_may_lack_the_column(tmp_path, kind):
    write(tmp_path, IMAGES)
    path = tmp_path / ("t.csv" if kind == "csv" else "t.parquet")
    if kind == "csv":
        write(tmp_path, {"t.csv": "image\na.jpg\nb.jpg\n"})
    else:
        images = [b"A", b"B"] if kind == "bytes" else ["a.jpg", "b.jpg"]
        write_parquet(path, image=images)
    names = ["t.parquet:0", "t.parquet:1"] if kind == "bytes" else ["a.jpg", "b.jpg"]
    assert read(path, needs_prompts=False) == dict(zip(names, [(b"A", ""), (b"B", "")], strict=True))
    assert "column `prompt`: a table needs `image` and `prompt`" in user_error(path)


def test_what_is_there_must_be_a_prompt(tmp_path):
    write(tmp_path, IMAGES)
    write_parquet(tmp_path / "t.parquet", image=["a.jpg"], prompt=pa.array([3]))
    (message,) = read(tmp_path / "t.parquet", needs_prompts=False).values()
    assert "`prompt` is of type int, not a string" in message


def test_a_tar_of_images_alone_stays_out_of_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_MAX_WAITING", 2)
    images = {f"{i}.jpg": b"%d" % i for i in range(5)}
    write_tar(tmp_path / "t.tar", [*images.items(), ("4.txt", b"four"), ("lone.txt", b"?")])
    found = read(tmp_path / "t.tar", needs_prompts=False)
    assert "lone.txt has no image beside it" in found.pop("lone")
    prompts = dict.fromkeys("01234", "") | {"4": "four"}
    assert found == {key: (key.encode(), prompt) for key, prompt in prompts.items()}
