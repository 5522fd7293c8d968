"""The commands that make and run a survey: what is taken, what is left out, what comes out."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from richhf_jax.survey import __main__ as survey
from richhf_jax.survey import answers
from richhf_jax.survey.store import Store


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as end:
        survey.main([str(argument) for argument in arguments])
    return end.value.code


@pytest.fixture
def folders(tmp_path, rng):
    """Three generators' images of five prompts."""
    for name in ("tuned", "plain", "third"):
        (tmp_path / name).mkdir()
        for i in range(5):
            pixels = rng.integers(0, 256, (12, 16, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.{'jpg' if name == 'plain' else 'png'}")
            (tmp_path / name / f"{i}.txt").write_text(f"a cat, {i}\n")
    return tmp_path


@pytest.fixture
def two(folders):
    return [folders / "survey", f"--a={folders / 'tuned'}", f"--b={folders / 'plain'}"]


def read_image(path: pathlib.Path) -> tuple[str, bytes]:
    """Returns an image's format and pixels."""
    with Image.open(path) as image:
        return image.format, image.tobytes()


def prompts_of(folder: pathlib.Path) -> list[str]:
    store = Store(folder)
    person = store.person(store.add_rater("someone"))
    found = []
    while work := store.next_pair(person):
        found.append(work.prompt)
        store.skip(person, work.token, 0, "")
    store.close()
    return sorted(found)


def test_a_survey_from_two_folders(two, folders, capsys):
    assert run("init", *two, "--raters=2", "--question=alignment") == 0
    assert "5 prompts, 2 generators, 5 pairs; 2 raters a pair" in capsys.readouterr().out
    config = json.loads((folders / "survey/config.json").read_text())
    assert (config["raters"], config["question"]) == (2, "Which image matches the prompt better?")
    files = sorted((folders / "survey/images").iterdir())
    assert len(files) == 10
    # All are PNG, with the pixels of the originals.
    assert {form for form, _ in map(read_image, files)} == {"PNG"}
    given = [*(folders / "tuned").glob("*.png"), *(folders / "plain").glob("*.jpg")]
    assert {pixels for _, pixels in map(read_image, files)} == {
        pixels for _, pixels in map(read_image, given)
    }
    assert prompts_of(folders / "survey") == [f"a cat, {i}" for i in range(5)]
    message = run("init", *two)
    assert "survey" in message
    assert "exist" in message or "empty" in message


def test_prompts_that_lack_an_image_are_listed(two, folders, capsys):
    (folders / "plain/3.txt").write_text("a dog")
    (folders / "tuned/1.txt").unlink()
    (folders / "plain/2.jpg").write_bytes(b"no image")
    assert run("init", *two) == 3
    out, told = capsys.readouterr()
    assert "2 prompts, 2 generators, 2 pairs" in out
    for line in (
        "'a cat, 3': no image of plain",
        "'a dog': no image of tuned",
        "'a cat, 1': no image of tuned",
        "plain: 2.jpg: ",
        "tuned: 1.png: ",
    ):
        assert f"left out: {line}" in told
    assert prompts_of(folders / "survey") == ["a cat, 0", "a cat, 4"]


def test_one_of_several_images_and_some_of_the_prompts_are_drawn(two, folders, rng, capsys):
    for i in range(20):
        pixels = rng.integers(0, 256, (12, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folders / f"tuned/more{i}.png")
        (folders / f"tuned/more{i}.txt").write_text("a cat, 0")
    images, prompts = [], []
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        assert run("init", folders / name, *two[1:], f"--seed={seed}") == 0
        assert "1 prompts have several images of a generator: --seed draws one" in capsys.readouterr().out
        images.append({path.name for path in (folders / name / "images").iterdir()})
        assert len(images[-1]) == 10
        assert run("init", folders / f"{name} few", *two[1:], f"--seed={seed}", "--prompts=3") == 0
        prompts.append(prompts_of(folders / f"{name} few"))
        assert len(prompts[-1]) == 3
    for drawn in (images, prompts):
        assert drawn[0] == drawn[1] != drawn[2]
    # More than there are.
    assert run("init", folders / "many", *two[1:], "--prompts=9") == 0
    assert "--prompts=9, but only 5 can be taken" in capsys.readouterr().err


def test_more_generators_and_names(two, folders, capsys):
    arguments = [two[0], f"--a=new={folders / 'tuned'}", two[2], "--others", folders / "third"]
    assert run("init", *arguments) == 0
    assert "5 prompts, 3 generators, 15 pairs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b": "other/tuned"}, "two generators are named 'tuned'; give NAME=DIR with other names"),
        ({"b": "x=tuned"}, "tuned and x have the same images on all prompts; name another folder"),
        ({"b": "nope"}, "no such file or folder"),
        ({"b": "empty"}, "empty"),
        ({"b": "dogs"}, "no prompt has an image of each generator"),
        ({"b": "broken"}, "no prompt is left"),
        ({"raters": "0"}, 2),
        ({"question": "taste"}, 2),
    ],
)
def test_what_makes_no_survey_is_refused(folders, monkeypatch, changes, message):
    monkeypatch.chdir(folders)
    for name, text in (("other/tuned", "a cat, 1"), ("dogs", "a dog"), ("broken", "a cat, 1")):
        (folders / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(folders / name / "1.png")
        (folders / name / "1.txt").write_text(text)
    (folders / "broken/1.png").write_bytes(b"no image")
    (folders / "empty").mkdir()
    options = {"a": "tuned", "b": "plain"} | changes
    found = run("init", "survey", *(f"--{name}={value}" for name, value in options.items()))
    assert found == message if isinstance(message, int) else message in found
    assert not (folders / "survey").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": ["a"]}, "`answers` must be 5 texts, the best for A first"),
        ({"question": " "}, "`question` must not be empty"),
        ({"check_rate": 0.9}, "`check_rate` must be a number from 0 to 0.5, got 0.9"),
        ({"colour": 1}, "unknown setting `colour`"),
        ({"raters": 1.5}, "`raters` must be a whole number"),
    ],
)
def test_wrong_settings_are_named(two, folders, change, message):
    assert run("init", *two) == 0
    file = folders / "survey/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert f"config.json: {message}" in run("status", folders / "survey")


@pytest.fixture
def answered(make, sides):
    """A survey with answers of two raters: Ann prefers "tuned_7", Bob sees no difference."""
    store, ann, bob = make(8, ["Ann", "Bob"], raters=2, check_rate=0.5)
    for person in (ann, bob):
        while work := store.next_pair(person):
            left, right = sides(store, person, work)
            answer = 3 if person is bob or left == right else 2 if left == "tuned_7" else 4
            store.finish(person, work.token, 0, answer, 10.0)
    return store.folder


def test_export_and_result_of_a_folder_and_of_a_file_are_the_same(answered, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    assert run("export", answered, out) == 0
    with out.open("rb") as file:
        found = [answer for _, answer in answers.read_answers(file)]
    assert not [answer for answer in found if isinstance(answer, answers.AnswerError)]
    assert {answer.rater_id for answer in found} == {"rater-1", "rater-2"}
    assert {answer.check for answer in found} == {"", "identical", "swapped"}
    capsys.readouterr()
    results = []
    for place in (answered, out):
        survey.main(["result", str(place), "--order", "tuned_7", "plain_1", "--format=json"])
        results.append(json.loads(capsys.readouterr().out))
    assert results[0] == results[1]
    [pair] = results[0]["pairs"]
    assert (pair["counts"], pair["win_rate"]) == ([0, 8, 8, 0, 0], 0.75)
    assert run("export", answered, out, "--names") == 0
    assert {json.loads(line)["rater_id"] for line in out.read_text().splitlines()} == {"Ann", "Bob"}


def test_status_and_raters(answered, capsys):
    assert run("raters", "add", answered, "Cid", "--url=https://a.org/") == 0
    name, link = capsys.readouterr().out.strip().split("\t")
    assert (name, link[:16]) == ("Cid", "https://a.org/r/")
    assert run("raters", "deactivate", answered, "Cid") == 0
    assert run("status", answered) == 0
    told, *lines = capsys.readouterr().out.splitlines()
    assert told == "Cid: the link is void"
    assert lines[0] == "8 of 8 pairs have 2 answers"
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    # Answers, skipped, median seconds; Ann passes all checks that she got.
    assert rows["Ann"][:3] == ["8", "0", "10.0"]
    assert rows["Ann"][3] == rows["Ann"][5] != "0"
    assert rows["Cid"] == ["0", "0", "0.0", "0", "of", "0", "(deactivated)"]
    assert "no rater named Dora" in run("raters", "renew", answered, "Dora")


def test_a_backup_can_be_opened(answered, tmp_path, capsys):
    assert run("backup", answered, tmp_path / "copy.db") == 0
    (answered / "survey.db").unlink()
    for rest in answered.glob("survey.db-*"):
        rest.unlink()
    assert "is no survey: it lacks config.json or survey.db" in run("status", answered)
    (tmp_path / "copy.db").rename(answered / "survey.db")
    assert run("status", answered) == 0


def test_a_project_is_no_survey(answered, tmp_path):
    (answered / "survey.db").write_bytes(b"no database" * 1000)
    assert "file is not a database" in run("status", answered)
    with pytest.raises(SystemExit, match="no survey"):
        survey.main(["result", str(tmp_path)])


def test_result_needs_no_web_server(answered):
    code = (
        "import sys; from richhf_jax.survey import __main__ as survey\n"
        f"survey.main(['result', {str(answered)!r}])\n"
        "assert not {'starlette', 'uvicorn', 'tensorflow', 'jax'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
