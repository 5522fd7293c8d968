"""The command: right predictions in order, named errors, and the same files after any kill."""

import collections
import csv
import dataclasses
import io
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent import futures

import jax
import numpy as np
import pytest
from PIL import Image

from richhf_jax import RahfPredictor, errors, feedback, inputs, locking, model_description
from richhf_jax.export import __main__ as export
from richhf_jax.predict import __main__ as predict
from richhf_jax.predict import files as prediction_files
from richhf_jax.predict import names, pipeline

ROOT = pathlib.Path(predict.__file__).resolve().parents[2]
COUNT, EACH = 1000, 3


def encoded(image: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def broken_files(plain: bytes) -> dict[str, tuple[str, bytes, str | None, str]]:
    """Maps a kind of damage to the file's extension, image and prompt, and a part of the expected reason."""
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    deep = Image.fromarray(np.full((16, 16), 40000, np.uint16))
    return {
        "truncated": (".png", plain[: len(plain) // 2], "a cat", "broken"),
        "empty": (".jpg", b"", "a cat", "no bytes"),
        "html": (".jpg", b"<!DOCTYPE html><html>404</html>", "a cat", "HTML page"),
        "one_pixel": (".png", encoded(Image.new("RGB", (1, 1)), "PNG"), "a cat", "1 x 1 pixels"),
        "wide": (".png", encoded(Image.new("RGB", (12000, 8)), "PNG"), "a cat", "12000 x 8 pixels"),
        "deep": (".png", encoded(deep, "PNG"), "a cat", "16 bits"),
        "animated": (
            ".gif",
            encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
            "a",
            "2 frames",
        ),
        "inks": (".jpg", encoded(Image.new("CMYK", (16, 16)), "JPEG"), "a cat", "CMYK"),
        "no_prompt": (".png", plain, None, "prompt"),
        "long_prompt": (".png", plain, "cat " * 5000, "5,000 words"),
    }


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """Makes a folder of images with prompts, some broken: (folder, good ids in order, bad id -> reason)."""
    rng = np.random.default_rng(5)
    folder = tmp_path_factory.mktemp("thousand")
    words = ["a", "one", "red", "blue", "circle", "star", "of", "and", "large,", "dog"]

    def noise():
        return Image.fromarray(rng.integers(0, 256, (int(rng.integers(8, 40)), 24, 3)).astype(np.uint8))

    ways = [way for way in broken_files(b"") for _ in range(EACH)]
    bad = dict(zip(rng.choice(COUNT, len(ways), replace=False), ways, strict=True))
    good, reasons = [], {}
    for number in range(COUNT):
        extension, image, reason = ".png", encoded(noise(), "PNG"), None
        prompt = " ".join(rng.choice(words, rng.integers(1, 12)))
        if number in bad:
            extension, image, prompt, reason = broken_files(image)[bad[number]]
        path = folder / f"{number // 100}" / f"{number:04}{extension}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image)
        if prompt is not None:
            path.with_suffix(".txt").write_text(prompt)
        name = str(path.relative_to(folder))
        if reason:
            reasons[name] = reason
        else:
            good.append(name)
    return folder, good, reasons


class Command:
    """`python -m richhf_jax.predict` as a user runs it."""

    def __init__(self, model_dir: pathlib.Path):
        self._model_dir = model_dir

    def start(self, out: pathlib.Path, *arguments) -> subprocess.Popen:
        command = [
            sys.executable,
            "-m",
            "richhf_jax.predict",
            f"--checkpoint={self._model_dir}",
            f"--out={out}",
        ]
        return subprocess.Popen(
            [*command, *map(str, arguments)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, out: pathlib.Path, *arguments) -> tuple[int, str, str]:
        """Runs the command. Returns the exit code, stdout and stderr."""
        process = self.start(out, *arguments)
        stdout, stderr = process.communicate()
        return process.returncode, stdout, stderr


@pytest.fixture(scope="module")
def command(model_dir):
    return Command(model_dir)


def lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def in_one_go(command, thousand, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "out"
    return out, command(out, thousand[0], "--overlay", "--report")


def test_a_thousand_images_of_which_thirty_are_broken(in_one_go, thousand, model_dir):
    folder, good, reasons = thousand
    out, (code, stdout, stderr) = in_one_go
    assert code == predict.SOME_FAILED, stderr
    assert f"{COUNT - len(reasons)} images scored" in stdout
    assert "30 could not be scored, see" in stderr
    assert "Traceback" not in stderr
    predictions, failures = lines(out / "predictions.jsonl"), lines(out / "errors.jsonl")
    assert [line["id"] for line in predictions] == good
    assert [line["id"] for line in failures] == sorted(reasons)
    for line in failures:
        assert reasons[line["id"]] in line["reason"]
        assert len(line["reason"]) < 300
    # The predictor gives the same for single images.
    loaded = RahfPredictor.from_checkpoint(model_dir, batch_size=2)
    for line in random.Random(0).sample(predictions, 20):
        path = folder / line["id"]
        expected = loaded(path, path.with_suffix(".txt").read_text(), line["id"])
        assert line["scores"] == pytest.approx(expected.scores, abs=1e-5)
        assert [token["misaligned"] for token in line["tokens"]] == [t.misaligned for t in expected.tokens]
        for kind, heatmap in expected.heatmaps.items():
            levels = np.asarray(Image.open(out / line["heatmaps"][kind])).astype(int)
            assert np.abs(levels - heatmap * 255).max() <= 0.51  # rounding
            assert line["heatmap_peaks"][kind] == pytest.approx(heatmap.max(), abs=1e-5)
            overlay = np.asarray(Image.open(out / f"overlays/{line['id']}.{kind}.png")).astype(int)
            assert np.abs(overlay - np.asarray(expected.overlay(kind))).max() <= 1


def test_killed_at_random_the_bytes_are_the_same(in_one_go, command, thousand, tmp_path):
    out, kills = tmp_path / "out", 0
    random_seconds = random.Random(1)
    while True:
        process = command.start(out, thousand[0], "--overlay", "--report")
        # Waits for the first line, so that compilation doesn't count, and then for a random time.
        before = size = (out / "predictions.jsonl").stat().st_size if kills else 0
        while size == before and process.poll() is None and kills < 3:
            time.sleep(0.02)
            path = out / "predictions.jsonl"
            size = path.stat().st_size if path.exists() else 0
        if kills < 3:
            time.sleep(random_seconds.uniform(0, 0.4))
            process.send_signal(signal.SIGKILL)
        process.communicate()
        if kills >= 3 or process.returncode != -signal.SIGKILL:
            break
        kills += 1
    assert kills >= 2, "it was too quick to be killed"
    assert process.returncode == predict.SOME_FAILED
    expected = contents(in_one_go[0])
    assert contents(out) == expected
    # The same command once more has nothing to do.
    code, stdout, _ = command(out, thousand[0], "--overlay", "--report")
    assert (code, contents(out)) == (predict.SOME_FAILED, expected)
    assert "970 images scored" in stdout


def test_shards_together_are_the_whole(in_one_go, command, thousand, tmp_path):
    for index in range(3):
        code, _, stderr = command(tmp_path / str(index), thousand[0], f"--shard={index}/3", "--heatmaps=none")
        assert code in (0, predict.SOME_FAILED), stderr
    together = [line for i in range(3) for line in lines(tmp_path / str(i) / "predictions.jsonl")]
    whole = lines(in_one_go[0] / "predictions.jsonl")
    assert [line["id"] for line in together] == [line["id"] for line in whole]
    assert {line["id"] for i in range(3) for line in lines(tmp_path / str(i) / "errors.jsonl")} == set(
        thousand[2]
    )
    for mine, other in zip(together, whole, strict=True):
        assert mine["scores"] == pytest.approx(other["scores"], abs=1e-5)
        assert mine["heatmaps"] == {}


# The following tests need only the files, so they run the command in this process.


@pytest.fixture
def score(model_dir, tmp_path, capsys):
    """Runs the command in this process. Returns (exit code or message, printed text)."""

    def run(*arguments, out=None):
        with pytest.raises(SystemExit) as exit_info:
            predict.main(
                [f"--checkpoint={model_dir}", f"--out={out or tmp_path / 'out'}", *map(str, arguments)]
            )
        return exit_info.value.code, capsys.readouterr()

    return run


@pytest.fixture
def table(tmp_path):
    """Makes a table of three rows, the last with the id of the first."""
    folder = tmp_path / "table"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (16, 12), (90 * i, 10, 10)).save(folder / f"{i}.png")
    rows = [{"image": f"{i}.png", "prompt": "a red cat", "id": f"../{i % 2}"} for i in range(3)]
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "t.jsonl"


@pytest.mark.parametrize(("model", "answer"), [("another", "model was 'another', now it is"), (None, 3)])
def test_a_run_continues_with_the_model_that_it_began_with(score, table, tmp_path, model, answer):
    """A run of an older version recorded the model's path alone: None."""
    assert score(table)[0] == 3
    state = json.loads((tmp_path / "out/run.json").read_text())
    state["arguments"] |= {"model": model}
    if model is None:
        del state["arguments"]["model"]
    (tmp_path / "out/run.json").write_text(json.dumps(state))
    code = score(table)[0]
    assert code == answer or str(answer) in str(code)


def test_one_image_with_its_prompt(score, table, tmp_path):
    code, printed = score(table.parent / "1.png", "--prompt=a red cat")
    assert (code, printed.out) == (0, f"1 images scored: {tmp_path / 'out' / 'predictions.jsonl'}\n")
    [line] = lines(tmp_path / "out/predictions.jsonl")
    assert list(line) == [
        "id", "prompt", "scores", "tokens", "heatmaps", "heatmap_peaks", "image_size", "position"
    ]  # fmt: skip
    assert (line["id"], line["prompt"], line["image_size"]) == ("1.png", "a red cat", [16, 12])
    assert [token["text"] for token in line["tokens"]] == ["a", "red", "cat"]


def test_each_folder_is_listed_once_and_each_table_read_twice(score, table, tmp_path, monkeypatch):
    folder = table.parent
    (folder / "inner").mkdir()
    (folder / "0.png").rename(folder / "inner/0.png")
    listed, opened = collections.Counter(), collections.Counter()
    scandir = os.scandir

    def counted_scandir(path="."):
        listed[os.path.normpath(path)] += 1
        return scandir(path)

    def counted_open(path, *options, **more):
        opened[path] += 1
        return open(path, *options, **more)

    monkeypatch.setattr(os, "scandir", counted_scandir)
    monkeypatch.setattr("richhf_jax.inputs.tables.open", counted_open, raising=False)
    assert score(folder, "--prompt=a cat")[0] == 0
    assert score(table, out=tmp_path / "again")[0] == predict.SOME_FAILED
    assert [listed[str(path)] for path in (folder, folder / "inner")] == [1, 1]
    assert opened == {str(table): 2}  # Once to count the rows, once to give them.


def test_a_duplicate_id_and_ids_that_are_no_file_names(score, table, tmp_path):
    code, _ = score(table)
    assert code == predict.SOME_FAILED
    assert [line["id"] for line in lines(tmp_path / "out/predictions.jsonl")] == ["../0", "../1"]
    [failure] = lines(tmp_path / "out/errors.jsonl")
    assert failure == {"id": "../0", "reason": "the id was there before; ids must differ"}
    assert sorted(path.name for path in (tmp_path / "out/heatmaps/%2E%2E").iterdir()) == [
        f"{i}.{kind}.png" for i in range(2) for kind in feedback.HEATMAPS
    ]
    assert not list(tmp_path.glob("*.png"))


def test_a_duplicate_is_one_in_another_shard_too(score, table, tmp_path):
    code, _ = score(table, "--shard=2/3")
    assert code == predict.SOME_FAILED
    assert [line["id"] for line in lines(tmp_path / "out/errors.jsonl")] == ["../0"]


def test_heatmaps_in_one_file(score, table, tmp_path):
    score(table, "--heatmaps=npz", "--batch-size=1")
    score(table, "--heatmaps=png", out=tmp_path / "png")
    with np.load(tmp_path / "out/heatmaps.npz") as arrays:
        found = dict(arrays)
    predictions = lines(tmp_path / "out/predictions.jsonl")
    places = [place for line in predictions for place in line["heatmaps"].values()]
    assert places == [f"heatmaps.npz#{name}" for name in found]
    for line in lines(tmp_path / "png/predictions.jsonl"):
        for kind, place in line["heatmaps"].items():
            array = found[f"{names.file_name(line['id'])}/{kind}"]
            assert (array.dtype, array.shape) == (np.float16, (12, 16))
            levels = np.asarray(Image.open(tmp_path / "png" / place)).astype(float)
            np.testing.assert_allclose(array, levels / 255, atol=0.51 / 255 + 5e-4)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "errors.jsonl", "heatmaps.npz", "predictions.jsonl", "run.json"
    ]  # fmt: skip


def test_report_of_few_holds_its_pictures(score, table, tmp_path):
    score(table, "--report")
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("<article") == 2
    assert "data:image/" in page
    assert not (tmp_path / "out/report").exists()


def test_report_of_many_links_its_pictures(score, table, tmp_path, monkeypatch):
    monkeypatch.setattr("richhf_jax.pages.gallery.MAX_EMBEDDED", 1)
    monkeypatch.setattr(prediction_files, "MAX_CARDS", 1)
    score(table, "--report")
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("<article") == 1
    assert "the first 1 of 2" in page
    assert '"report/0.png"' in page
    assert (tmp_path / "out/report/0.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size=2"], "was 16, now it is 2. Give the same command to continue, with --batch-size=16"),
        (["--overlay"], "overlay was False, now it is True"),
        (["--shard=0/2"], "shard was '0/1', now it is '0/2'"),
    ],
)
def test_a_run_continues_with_the_same_arguments_only(score, table, arguments, message):
    score(table)
    code, _ = score(table, *arguments)
    assert message in code


def test_a_run_continues_with_the_same_checkpoint_and_inputs_only(score, table, model_dir, tmp_path):
    score(table.parent, "--prompt=a")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in model_dir.iterdir():
        (copy / path.name).symlink_to(path)
    code, _ = score(table.parent, "--prompt=a", f"--checkpoint={copy}")
    assert f"Give --checkpoint={model_dir}/checkpoint_0 to continue" in code
    (table.parent / "2.png").rename(table.parent / "3.png")
    assert "names_and_files was" in score(table.parent, "--prompt=a")[0]


def test_a_run_that_scored_nothing_begins_anew(score, table, tmp_path):
    code, printed = score(table.parent / "1.png")
    assert code == predict.SOME_FAILED
    assert "  1.png: " in printed.err  # The reason.
    assert score(table.parent / "1.png", "--prompt=a red cat", "--batch-size=2")[0] == 0
    assert len(lines(tmp_path / "out/predictions.jsonl")) == 1
    assert lines(tmp_path / "out/errors.jsonl") == []


def test_lost_lines_are_told(score, table, tmp_path):
    score(table)
    (tmp_path / "out/predictions.jsonl").unlink()
    assert "predictions.jsonl has lost lines that run.json knows of" in score(table)[0]
    (tmp_path / "out/run.json").write_text("{")
    assert "run.json is damaged" in score(table)[0]


def test_a_run_that_was_killed_at_its_very_start(score, table, tmp_path):
    (tmp_path / "out").mkdir()
    for name in (".run.json.new", ".lock", ".lock.__lock"):
        (tmp_path / "out" / name).write_text("{")
    assert score(table)[0] == predict.SOME_FAILED


def test_one_process_a_directory(score, table, tmp_path):
    with locking.held(tmp_path / "out", "--out"):
        assert re.search(r"another process \(.*\) writes to .*/out: wait for it, or name", score(table)[0])
    assert score(table)[0] == predict.SOME_FAILED


def test_a_library_that_fails_at_one_record(score, table, tmp_path, monkeypatch):
    prepare = RahfPredictor.prepare

    def fail(self, picture, prompt):
        prepared = prepare(self, picture, prompt)
        if prepared.image[0, 0, 0] == 90:
            raise RuntimeError("a bug")
        return prepared

    monkeypatch.setattr(RahfPredictor, "prepare", fail)
    assert score(table)[0] == predict.SOME_FAILED
    assert {"id": "../1", "reason": "RuntimeError: a bug"} in lines(tmp_path / "out/errors.jsonl")
    assert [line["id"] for line in lines(tmp_path / "out/predictions.jsonl")] == ["../0"]


@pytest.mark.parametrize("name", ["safetensors", "stablehlo", "orbax"])
def test_exports_are_checkpoints(score, table, model_dir, tmp_path, name):
    export.main([f"--checkpoint={model_dir}", f"--to={name}", f"--out={tmp_path / name}"])
    score(table)
    assert score(table, f"--checkpoint={tmp_path / name}", out=tmp_path / "again")[0] == predict.SOME_FAILED
    first, again = (lines(tmp_path / out / "predictions.jsonl") for out in ("out", "again"))
    assert first == again
    # And an export can be exported.
    export.main([f"--checkpoint={tmp_path / name}", "--to=orbax", f"--out={tmp_path / 'third'}"])


@pytest.mark.parametrize("heatmaps", ["png", "npz"])
def test_large_images_are_read_again_for_the_same_files(score, table, tmp_path, monkeypatch, heatmaps):
    options = ("--overlay", "--report", f"--heatmaps={heatmaps}")
    score(table, *options)
    read, reads = RahfPredictor.read, []
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_KEPT_BYTES", 16 * 12 * 3 - 1)
        patch.setattr(RahfPredictor, "read", lambda self, data: reads.append(data) or read(self, data))
        score(table, *options, "--batch-size=16", out=tmp_path / "again")
    assert len(reads) == 4  # Each of the two images twice.
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_a_large_image_that_is_changed_meanwhile(score, table, tmp_path, monkeypatch):
    first = table.parent / "0.png"
    prepare = RahfPredictor.prepare

    def change(self, picture, prompt):
        prepared = prepare(self, picture, prompt)
        if first.read_bytes() == picture:
            first.write_bytes((table.parent / "1.png").read_bytes())
        return prepared

    monkeypatch.setattr(pipeline, "_KEPT_BYTES", 0)
    monkeypatch.setattr(RahfPredictor, "prepare", change)
    assert score(table, "--overlay")[0] == predict.SOME_FAILED
    failure = {"id": "../0", "reason": "the image was changed while it was scored"}
    assert failure in lines(tmp_path / "out/errors.jsonl")
    assert [line["id"] for line in lines(tmp_path / "out/predictions.jsonl")] == ["../1"]


def test_as_many_pixels_at_a_time_as_there_is_room_for():
    room, lock, now, most = pipeline._Room(10), threading.Lock(), 0, 0

    def work(pixels):
        nonlocal now, most
        with room.take(pixels):
            with lock:
                now += pixels
                most = max(most, now)
            time.sleep(0.001)
            with lock:
                now -= pixels

    sizes = np.random.default_rng(0).integers(1, 10, 60).tolist()
    with futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(work, sizes))
    assert 5 < most <= 10
    with room.take(1000):  # One that is larger than the room works alone.
        assert room._left == 0


@pytest.fixture
def not_finite(monkeypatch):
    """Lets the model answer NaN for the images whose first pixel has one of these values of red."""
    dispatch, red = RahfPredictor.dispatch, set()

    def damaged(self, prepared, rows=None):
        outputs = dict(dispatch(self, prepared, rows))
        for row, one in enumerate(prepared):
            if one.square[0, 0, 0] in red:
                outputs["scores"] = outputs["scores"].at[row, 0].set(np.nan)
        return outputs

    monkeypatch.setattr(RahfPredictor, "dispatch", damaged)
    return red


def test_an_image_whose_scores_are_not_finite_fails_alone(score, table, tmp_path, not_finite):
    not_finite.add(90)
    assert score(table)[0] == predict.SOME_FAILED
    assert [line["id"] for line in lines(tmp_path / "out/predictions.jsonl")] == ["../0"]
    reasons = {line["id"]: line["reason"] for line in lines(tmp_path / "out/errors.jsonl")}
    assert "the model's scores aren't finite numbers" in reasons["../1"]
    assert not list((tmp_path / "out").rglob("1.*.png"))


def test_a_model_that_gives_no_finite_score_is_blamed(score, table, model_dir, not_finite):
    not_finite.update((0, 90))
    message = f"{model_dir}/checkpoint_0 scores no image: its outputs aren't finite numbers"
    assert message in score(table)[0]


def test_control_characters_of_others_do_not_reach_the_terminal(score, table):
    rows = [{"image": "gone\x1b[31m.png", "prompt": "a", "id": "\x1b]0;title\x07\nroot: fine"}]
    rows.append({"image": "0.png", "prompt": "a"})
    table.write_text("\n".join(map(json.dumps, rows)))
    code, printed = score(table)
    assert code == predict.SOME_FAILED
    assert r"  \x1b]0;title\x07\nroot: fine: " in printed.err
    assert "\x1b" not in printed.out + printed.err
    assert not any(line.startswith("root:") for line in printed.err.splitlines())
    assert "\x1b" not in score(table.parent / "\x1b[2J.png")[0]


def test_a_file_that_disappears_after_the_folder_was_listed(score, table, tmp_path, monkeypatch):
    fingerprint = inputs.Inputs.fingerprint

    def change(self):
        (table.parent / "0.png").unlink()
        Image.new("RGB", (16, 12)).save(table.parent / "00.png")
        return fingerprint(self)

    monkeypatch.setattr(inputs.Inputs, "fingerprint", change)
    assert score(table.parent, "--prompt=a cat")[0] == predict.SOME_FAILED
    assert [line["id"] for line in lines(tmp_path / "out/predictions.jsonl")] == ["1.png", "2.png"]
    [failure] = lines(tmp_path / "out/errors.jsonl")
    assert failure["id"] == "0.png"
    assert "No such file" in failure["reason"]


def test_a_table_that_gets_shorter_meanwhile(score, table, tmp_path, monkeypatch):
    commit = prediction_files.PredictionFiles.commit

    def cut(self, position, results):
        commit(self, position, results)
        table.write_text(table.read_text().partition("\n")[0])

    with monkeypatch.context() as patch:
        patch.setattr(prediction_files.PredictionFiles, "commit", cut)
        code, _ = score(table, "--batch-size=1")
    assert code.startswith(f"predict: {table} was written or replaced while it was read; it had 3 records")
    state = json.loads((tmp_path / "out/run.json").read_text())
    assert not state["progress"]["done"]
    assert len(lines(tmp_path / "out/predictions.jsonl")) == state["progress"]["predictions"] > 0
    assert re.search("names_and_files was .* or another --out", score(table, "--batch-size=1")[0])


def test_a_cache_that_cannot_be_used_is_told(score, table, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)

    def stop(*args, **options):  # The model isn't needed.
        raise errors.UserError("enough")

    monkeypatch.setattr(RahfPredictor, "from_checkpoint", stop)
    try:
        code, printed = score(table)
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
    assert code == "predict: enough"
    assert "compiled programs aren't kept" in printed.err


def test_mistakes_are_one_message(score, table, tmp_path, model_dir):
    assert "no such" in score(tmp_path / "nowhere")[0].lower()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").touch()
    assert "holds 'mine.txt', but no run to continue" in score(table, out=tmp_path / "full")[0]
    (tmp_path / "file").touch()
    assert "is no directory: name a new one" in score(table, out=tmp_path / "file")[0]
    assert "lies in" in score(table.parent, out=table.parent / "out")[0]
    assert "no checkpoint_<step>" in score(f"--checkpoint={tmp_path}", table)[0]
    assert "a local directory is needed" in score(table, out="gs://bucket/out")[0]
    for wrong in ("--shard=3/3", "--shard=1", "--batch-size=0", "--dtype=int8"):
        assert score(table, wrong)[0] == 2
    assert not (tmp_path / "out").exists()


def test_what_run_json_tells_of_is_on_the_disk_before_it(tmp_path, monkeypatch):
    calls = []

    def spy(name, describe):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args: [calls.append((name, describe(*args))), call(*args)])

    with prediction_files.PredictionFiles(str(tmp_path), {"checkpoint": "c"}, 0) as files:
        # The pictures and the lines are all written when they are brought to the disk.
        spy("sync", lambda: len(lines(tmp_path / "errors.jsonl")))
        spy("fsync", lambda descriptor: pathlib.Path(f"/proc/self/fd/{descriptor}").readlink().name)
        spy("replace", lambda source, target: pathlib.Path(target).name)
        monkeypatch.setattr(prediction_files, "_SAVE_SECONDS", 0)
        files.commit(1, [prediction_files.Failure("a", "a reason")])
        first, calls[:] = calls.copy(), []
        # Not for each of many quick batches; but at the end, also where something fails.
        monkeypatch.setattr(prediction_files, "_SAVE_SECONDS", 1000)
        files.commit(2, [prediction_files.Failure("b", "a reason")])
        assert not calls
    assert ("sync", 2) in calls
    assert json.loads((tmp_path / "run.json").read_text())["progress"]["position"] == 2
    assert first == [
        ("sync", 1),
        ("fsync", "predictions.jsonl"),
        ("fsync", "errors.jsonl"),
        ("fsync", ".run.json.new"),
        ("replace", "run.json"),
        ("fsync", tmp_path.name),
    ]


def test_what_a_run_left_that_did_nothing_is_in_no_result(tmp_path):
    parts = tmp_path / "heatmaps.parts"
    parts.mkdir()
    np.savez(parts / "000000000007.npz", foreign=np.zeros(3))
    # Of a run that was killed in its first batch.
    (tmp_path / "run.json").write_text(
        '{"arguments": {"shard": "1/2"}, "progress": {"position": 7, "predictions": 0}}'
    )
    with prediction_files.PredictionFiles(str(tmp_path), {"checkpoint": "c"}, 0, "npz") as files:
        files.commit(1, [prediction_files.Failure("a", "a reason")])
        files.finish("title")
    assert np.load(tmp_path / "heatmaps.npz").files == []


@pytest.fixture
def stopped(score, tmp_path, monkeypatch):
    """Runs the command on six images in batches of two; a full disk stops it in the second batch."""
    folder = tmp_path / "six"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (16, 12), (40 * i, 10, 10)).save(folder / f"{i}.png")
    for i in (4, 5):  # Empty files give the threads, which are told to stop, no work.
        (folder / f"{i}.png").touch()
    save, shutdown = prediction_files.PredictionFiles._save, futures.ThreadPoolExecutor.shutdown

    def fail(self, place, content):
        if "3." in place:
            raise OSError(28, "No space left on device", place)
        save(self, place, content)

    def shutdown_late(self, **options):  # A writer that goes on would have the time for the third batch.
        time.sleep(0.3)
        shutdown(self, **options)

    with monkeypatch.context() as patch:
        patch.setattr(prediction_files.PredictionFiles, "_save", fail)
        patch.setattr(futures.ThreadPoolExecutor, "shutdown", shutdown_late)
        code, _ = score(folder, "--prompt=a red cat", "--batch-size=2")
    assert (
        "No space left on device. What is written stays; when that is mended, the same command continues"
        in code
    )
    return folder


def test_a_full_disk_loses_nothing(score, stopped, tmp_path):
    # Nothing behind the batch that failed was written, though it was computed.
    assert [line["id"] for line in lines(tmp_path / "out/predictions.jsonl")] == ["0.png", "1.png"]
    assert lines(tmp_path / "out/errors.jsonl") == []
    assert score(stopped, "--prompt=a red cat", "--batch-size=2")[0] == predict.SOME_FAILED
    assert [line["position"] for line in lines(tmp_path / "out/predictions.jsonl")] == list(range(4))


def test_lines_that_the_run_does_not_know_of_are_cut_off(score, stopped, tmp_path):
    """A kill between writing lines and run.json leaves such lines."""
    with (tmp_path / "out/predictions.jsonl").open("a") as file:
        file.write('{"id": "2.png"}\n{"id": "3.p')
    with (tmp_path / "out/errors.jsonl").open("a") as file:
        file.write('{"id": "3.png"}\n')
    assert score(stopped, "--prompt=a red cat", "--batch-size=2")[0] == predict.SOME_FAILED
    assert [line["position"] for line in lines(tmp_path / "out/predictions.jsonl")] == list(range(4))
    assert [line["id"] for line in lines(tmp_path / "out/errors.jsonl")] == ["4.png", "5.png"]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("cats/1.png", "cats/1.png"),
        ("/etc/passwd", "%/etc/passwd"),
        ("x.png", "x.png"),
        ("x.png/b", "x.png%/b"),
        ("a//b", "a/%/b"),
        ("../../x", "%2E%2E/%2E%2E/x"),
        ("a?b*:c\\d\n.png", "a%3Fb%2A%3Ac%5Cd%0A.png"),
        ("%", "%25"),
        ("猫.png", "%E7%8C%AB.png"),
    ],
)
def test_file_names(name, path):
    assert names.file_name(name) == path


def test_long_file_names_differ():
    first, second = (names.file_name("x" * 300 + end) for end in "ab")
    assert first != second
    assert len(first) < 200
    deep = names.file_name("/".join(["x" * 150] * 40))
    assert len(deep) < 200
    assert "/" not in deep


def test_uncertainties(make_model_dir, table, tmp_path, capsys):
    """Raw ones with a note, calibrated ones without; both in the lines, the order and the report."""
    directory = make_model_dir(uncertainty=True)

    def run(out, answer=predict.SOME_FAILED):  # One id is there twice.
        with pytest.raises(SystemExit, match=str(answer)):
            predict.main(
                [f"--checkpoint={directory}", f"--out={out}", str(table), "--report", "--heatmaps=none"]
            )
        return lines(out / "predictions.jsonl"), capsys.readouterr().err

    raw, note = run(tmp_path / "raw")
    assert "predict: the uncertainties aren't calibrated for this checkpoint" in note
    description = model_description.read(directory)
    factors = dict(zip(feedback.SCORES, (0.5, 1, 2, 4), strict=True))
    calibration = model_description.Calibration(0, factors, "task", "validation", 8)
    dataclasses.replace(description, calibration=calibration).write(directory)
    found, note = run(tmp_path / "calibrated")
    assert "predict:" not in note
    for line, before in zip(found, raw, strict=True):
        assert before["uncertainty"].keys() == set(feedback.SCORES)
        assert all(0.01 <= value <= 1 for value in before["uncertainty"].values())
        for kind, factor in factors.items():
            assert line["uncertainty"][kind] == pytest.approx(factor * before["uncertainty"][kind], rel=1e-6)
        assert line | {"uncertainty": 0} == before | {"uncertainty": 0}
    with (tmp_path / "calibrated/order.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    mean = {kind: np.mean([line["uncertainty"][kind] for line in found]) for kind in factors}
    expected = {
        line["id"]: np.mean([line["uncertainty"][kind] / mean[kind] for kind in factors]) for line in found
    }
    assert [row["image"] for row in rows] == sorted(expected, key=lambda id: -expected[id])
    for row in rows:
        assert float(row["uncertainty"]) == pytest.approx(expected[row["image"]], abs=1e-4)
        assert row["prompt"] == "a red cat"
    page = (tmp_path / "calibrated/report.html").read_text(encoding="utf-8")
    for line in found:
        assert all(f"± {value:.2f}" in page for value in line["uncertainty"].values())
    # What is calibrated otherwise is no continuation.
    run(tmp_path / "raw", "other arguments: calibration was None, now it is .*'overall': 4.*; model was")
