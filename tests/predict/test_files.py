"""The files of a run without a model: what a power cut damaged is made again, and no two ids share a file."""

import itertools
import json
import pathlib
import re
import shutil

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from richhf_jax import errors, feedback, inputs, locking
from richhf_jax.predict import files as prediction_files
from richhf_jax.predict import names, pipeline, predictor

COUNT, KILLED_AT = 5, 4


def prediction(position: int) -> predictor.Prediction:
    rng = np.random.default_rng(position)
    return predictor.Prediction(
        id=f"folder/{position}",
        prompt="a cat",
        scores=dict.fromkeys(feedback.SCORES, position / COUNT),
        heatmaps={kind: rng.random((16, 20), np.float32) for kind in feedback.HEATMAPS},
        tokens=(feedback.Token("a", False, 0.25), feedback.Token("cat", True)),
        picture=rng.integers(0, 256, (16, 20, 3)).astype(np.uint8),
        size=(16, 20),
        words_cut=0,
    )


def run(out: pathlib.Path, killed: pathlib.Path | None = None, heatmaps: str = "png") -> None:
    """Writes COUNT records, one a failure; copies to `killed` what a kill at KILLED_AT would leave."""
    with prediction_files.PredictionFiles(str(out), {"checkpoint": "c"}, 0, heatmaps, True, True) as files:
        for position in range(files.progress.position, COUNT):
            if position == KILLED_AT and killed:
                shutil.copytree(out, killed)
            one = prediction(position)
            if position % 3 == 2:
                result = prediction_files.Failure(one.id, "a reason")
            else:
                result = files.save(position, names.file_name(one.id), one)
            files.commit(position + 1, [result])
        files.finish("title")


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module", params=prediction_files.HEATMAP_FORMATS)
def killed(request, tmp_path_factory):
    """Makes a run killed after some saves: (format of heatmaps, its folder, the files of a whole run)."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction_files, "_SAVE_SECONDS", 0)
        run(folder / "whole", folder / "killed", request.param)
    return request.param, folder / "killed", contents(folder / "whole")


def test_a_killed_run_continues_to_the_same_files(killed, tmp_path, capsys):
    heatmaps, folder, whole = killed
    shutil.copytree(folder, tmp_path / "out")
    run(tmp_path / "out", heatmaps=heatmaps)
    assert contents(tmp_path / "out") == whole
    assert not capsys.readouterr().err


def damaged(data: bytes, rng: np.random.Generator) -> bytes | None:
    """Returns what a power cut may leave of a file: None for no file."""
    start = rng.integers(len(data))
    return [data[:start] + bytes(len(data) - start), data[:start], b"", None][rng.integers(4)]


def test_what_a_power_cut_damaged_is_made_again(killed, tmp_path, monkeypatch, rng):
    heatmaps, folder, whole = killed
    monkeypatch.setattr("os.sync", lambda: None)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    found = contents(folder)
    del found["run.json"]  # It is synchronised by itself; a damaged one is told.
    del found[locking.RECORD]  # The killed run's.
    # One of each kind of file.
    of_kind = {(name.partition("/")[0], pathlib.Path(name).suffix): name for name in found}
    assert len(of_kind) == {"png": 6, "npz": 6, "none": 5}[heatmaps]
    for name in of_kind.values():
        data = found[name]
        out = tmp_path / name.replace("/", "_")
        shutil.copytree(folder, out)
        content = damaged(data, rng)
        (out / name).unlink()
        if content is not None:
            (out / name).write_bytes(content)
        run(out, heatmaps=heatmaps)
        assert contents(out) == whole, name


def test_it_says_what_is_made_again(killed, tmp_path, capsys):
    heatmaps, folder, _ = killed
    shutil.copytree(folder, tmp_path / "out")
    path = tmp_path / "out/predictions.jsonl"
    path.write_bytes(path.read_bytes()[:-10] + bytes(10))  # The last line is that of record 3.
    run(tmp_path / "out", heatmaps=heatmaps)
    assert "the results of the last 1 records are damaged" in capsys.readouterr().err


def test_a_whole_run_that_was_damaged_says_so(killed, tmp_path):
    _, _, whole = killed
    (tmp_path / "run.json").write_bytes(whole["run.json"])
    (tmp_path / "errors.jsonl").write_bytes(whole["errors.jsonl"])
    flipped = bytearray(whole["predictions.jsonl"])
    flipped[30] ^= 1
    (tmp_path / "predictions.jsonl").write_bytes(flipped)
    arguments = {"checkpoint": "c"}
    format_of = json.loads(whole["run.json"])["arguments"]["heatmaps"]
    with pytest.raises(errors.UserError, match="has lost lines that run.json knows of, or was changed"):
        prediction_files.PredictionFiles(str(tmp_path), arguments, 0, format_of, True, True)
    assert (tmp_path / "predictions.jsonl").read_bytes() == flipped


def of_an_older_version(folder: pathlib.Path) -> None:
    """Leaves in run.json what versions without checksums wrote."""
    state = json.loads((folder / "run.json").read_text())
    del state["earlier"]
    for name in ("predictions_crc32c", "errors_crc32c"):
        del state["progress"][name]
    (folder / "run.json").write_text(json.dumps(state))


def test_a_run_of_an_older_version_continues(killed, tmp_path):
    heatmaps, folder, whole = killed
    shutil.copytree(folder, tmp_path / "out")
    of_an_older_version(tmp_path / "out")
    if heatmaps == "npz":
        with pytest.raises(errors.UserError, match="older version, which kept its heatmaps otherwise"):
            run(tmp_path / "out", heatmaps=heatmaps)
        return
    run(tmp_path / "out", heatmaps=heatmaps)
    assert contents(tmp_path / "out") == whole
    of_an_older_version(tmp_path / "out")
    run(tmp_path / "out", heatmaps=heatmaps)  # It is done.
    assert contents(tmp_path / "out").keys() == whole.keys()
    of_an_older_version(tmp_path / "out")
    (tmp_path / "out/predictions.jsonl").write_bytes(whole["predictions.jsonl"][:-1])
    with pytest.raises(errors.UserError, match="has lost lines that run.json knows of"):
        run(tmp_path / "out", heatmaps=heatmaps)


@pytest.mark.parametrize("change", [shutil.rmtree, lambda out: out.rename(f"{out}.old")])
@pytest.mark.parametrize("then", ["save", "commit", "finish"])
def test_a_folder_that_disappears(tmp_path, monkeypatch, change, then):
    monkeypatch.setattr(prediction_files, "_SAVE_SECONDS", 0)
    gone = pytest.raises(errors.UserError, match="/out was deleted, moved or emptied while this process")
    with gone, prediction_files.PredictionFiles(str(tmp_path / "out"), {"checkpoint": "c"}, 0) as files:
        files.commit(1, [files.save(0, "folder/0", prediction(0))])
        change(tmp_path / "out")
        if then == "save":
            files.save(1, "folder/1", prediction(1))
        elif then == "commit":
            files.commit(2, [prediction_files.Failure("1", "a reason")])
        else:
            files.finish("title")
    assert not (tmp_path / "out").exists()


def test_no_number_is_written_that_is_no_json(tmp_path):
    with prediction_files.PredictionFiles(str(tmp_path), {"checkpoint": "c"}, 0) as files:
        with pytest.raises(ValueError, match="not JSON compliant"):
            files.commit(1, [prediction_files.Scored({"score": float("nan")})])
        assert files.progress.position == 0


# Names.

PARTS = st.text("aAkKéE\u0301\u212a%=.2 5F/?*\\-_pngPNG\n", max_size=12)
REPEATED = st.builds(lambda part, count: part * count, PARTS, st.integers(1, 99))
IDS = st.one_of(PARTS, REPEATED, st.text(max_size=8))


def records(ids):
    return [inputs.Record(name, lambda: (b"", "")) for name in ids]


@hypothesis.settings(max_examples=50)
@hypothesis.given(st.lists(IDS, min_size=2, max_size=12))
def test_no_two_ids_share_a_file(ids):
    ids = [inputs.record.printable(name) for name in ids]
    given_names = {}
    for one in pipeline.numbered(records(ids), 0, len(ids)):
        assert one.again == (one.record.id in given_names)
        if not one.again:
            given_names[one.record.id] = one.file_name
    paths = [f"{name}.{kind}.png".lower() for name in given_names.values() for kind in feedback.HEATMAPS]
    assert len(set(paths)) == len(paths)
    folders = {str(parent) for path in paths for parent in pathlib.PurePosixPath(path).parents}
    assert folders.isdisjoint(paths)
    for path in paths:
        assert path.isascii()
        assert len(path) < 1100
        for part in path.split("/"):
            assert 0 < len(part) < 255
            assert part not in (".", "..")
            assert part == part.rstrip(". ")  # Windows would drop them.
            assert not set(part) & set('\\:*?"<>|')


@hypothesis.settings(max_examples=30)
@hypothesis.given(st.from_regex(names._PLAIN, fullmatch=True))
def test_a_plain_id_is_its_file_name(name):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(names, "_PLAIN", re.compile("(?!)"))
        assert names.file_name(name) == name or len(name) > 200


def test_a_hash_that_looks_like_an_escape_is_no_other_id():
    paths = (names.file_name(f"{'a' * 220}{i}") for i in itertools.count())
    path = next(path for path in paths if path[-32:].startswith("21"))
    # Without the mark before the hash, "!" would be such an escape: "%21".
    assert names.file_name(f"{'a' * 100}!{path[-30:]}") != path


def test_ids_that_differ_in_capitals_alone():
    ids = ["A.PNG", "a.png", "é", "e\u0301", "A.PNG", "a.png", "B"]
    found = [(one.file_name.partition("%=")[0], one.again) for one in pipeline.numbered(records(ids), 0, 7)]
    assert found == [
        ("A.PNG", False),
        ("a.png", False),
        ("%C3%A9", False),
        ("e%CC%81", False),
        ("A.PNG", True),
        ("a.png", True),
        ("B", False),
    ]
    hashed = [one.file_name for one in pipeline.numbered(records(ids), 1, 2)]
    assert hashed[0].startswith("a.png%=")  # Whether or not the shard scores the first of the two.
