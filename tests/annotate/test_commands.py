"""The commands: from a folder of images to records, and answers on their way out and in."""

import contextlib
import csv
import io
import json
import socket
import sqlite3

import numpy as np
import pytest
from PIL import Image

from richhf_jax import feedback
from richhf_jax.annotate import __main__ as command
from richhf_jax.annotate import answers, commands, manage, transfer
from richhf_jax.annotate.store import Store
from richhf_jax.datasets import consolidate, ratings, tfrecord

PROMPTS = {"0.png": 'A red cat, "happy" as ever!', "sub/1.png": "two dogs <script>alert(1)</script>"}
SIZES = {"0.png": (50, 40), "sub/1.png": (64, 80)}
# Rater -> image -> points of both kinds, misaligned tokens, the four ratings.
GIVEN = {
    "ann": {
        "0.png": ([[10, 10], [30.25, 20]], [], [1], (1, 2, 3, 4)),
        "sub/1.png": ([], [[63, 79.5]], [], (5, 5, 5, 5)),
    },
    "bob": {"0.png": ([[11, 10]], [[0, 0]], [1, 2], (3, 4, 3, 5)), "sub/1.png": ([], [], [0], (5, 1, 4, 4))},
    "=cid": {"0.png": ([], [], [], (5, 5, 4, 5)), "sub/1.png": ([[7.5, 3]], [[1, 2]], [], (2, 3, 4, 5))},
}


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as end:
        command.main([str(argument) for argument in arguments])
    return end.value.code


@pytest.fixture
def images(tmp_path, rng):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name, (width, height) in SIZES.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8)).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(PROMPTS[name])
    return folder


@pytest.fixture
def project(tmp_path, images, capsys):
    assert run("init", tmp_path / "project", "--images", images) == 0
    assert "2 images, 0 of them gold; 3 raters an image" in capsys.readouterr().out
    return tmp_path / "project"


@pytest.fixture
def rated(project, capsys):
    """A project with the answers of GIVEN, given by the links that the command printed."""
    assert run("raters", "add", project, *GIVEN, "--url=https://a.org/") == 0
    links = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in links] == list(GIVEN)
    store = Store(project)
    for name, link in links:
        person = store.person(link.removeprefix("https://a.org/r/"))
        while work := store.next_item(person):
            implausible, misaligned, words, scores = GIVEN[name][work.item.id]
            answer = {
                **work.answer,
                "implausibility_points": implausible,
                "misalignment_points": misaligned,
                "token_labels": [int(i not in words) for i in range(len(work.answer["token_labels"]))],
                "nothing": dict.fromkeys(work.answer["nothing"], True),
                "ratings": dict(zip(feedback.SCORES, scores, strict=True)),
                "comment": f"a comment of {name}",
            }
            store.finish(person, work.item.id, work.revision, answer, 12.5)
    store.close()
    return project


def parsed(path) -> dict[tuple[str, str], ratings.Rating]:
    with path.open("rb") as file:
        found = [rating for _, rating in ratings.read_ratings(file)]
    return {(r.rater_id, r.image_id): r for r in found}


def test_export_consolidates_to_the_records_of_what_was_given(rated, tmp_path):
    assert run("export", rated, tmp_path / "raw.jsonl") == 0
    consolidate.main([str(tmp_path / "raw.jsonl"), str(tmp_path / "out.tfrecord")])
    with (tmp_path / "out.tfrecord").open("rb") as file:
        records = [tfrecord.parse_example(data) for data in tfrecord.read(file)]
    found = {record["filename"].bytes_list.value[0].decode(): record for record in records}
    assert found.keys() == PROMPTS.keys()
    for name, record in found.items():
        width, height = SIZES[name]
        rows, columns = np.mgrid[:height, :width]
        given = [rater[name] for rater in GIVEN.values()]
        for field, kind in (("artifact_map", 0), ("misalignment_map", 1)):
            maps = [
                np.any(
                    [np.hypot(columns - x, rows - y) <= height / 20 for x, y in answer[kind]]
                    or [False * rows],
                    0,
                )
                for answer in given
            ]
            expected = np.rint(np.mean(maps, 0) * 255)
            np.testing.assert_array_equal(
                np.asarray(Image.open(io.BytesIO(record[field].bytes_list.value[0]))), expected
            )
        scores = (np.mean([answer[3] for answer in given], 0) - 1) / 4
        fields = ("artifact_score", "misalignment_score", "aesthetics_score", "overall_score")
        np.testing.assert_allclose([record[field].float_list.value[0] for field in fields], scores, rtol=1e-6)
        count = len(feedback.tokenize_prompt(PROMPTS[name]))
        votes = [sum(i in answer[2] for answer in given) for i in range(count)]
        labels = " ".join("0" if v >= 2 else "1" for v in votes)
        assert record["prompt_misalignment_label"].bytes_list.value[0].decode() == labels


def test_raters_have_pseudonyms_unless_names_are_asked_for(rated, tmp_path):
    outs = {"raw": "raw.jsonl", "scores": "scores.csv", "label-studio": "tasks.json"}
    for form, name in outs.items():
        assert run("export", rated, tmp_path / name, f"--format={form}") == 0
        text = (tmp_path / name).read_text()
        assert "rater-2" in text
        if form != "label-studio":  # Its comments are the raters' own words.
            assert not [rater for rater in GIVEN if f'"{rater}"' in text or f",{rater}," in text]
        assert run("export", rated, tmp_path / name, f"--format={form}", "--names") == 0
        assert "=cid" in (tmp_path / name).read_text()
    rows = list(csv.DictReader((tmp_path / "scores.csv").read_text().splitlines()))
    assert len(rows) == 6
    row = next(row for row in rows if (row["image"], row["rater"]) == ("0.png", "bob"))
    assert [row[kind] for kind in feedback.SCORES] == ["3", "4", "3", "5"]
    assert row["seconds"] == "12.5"


def test_label_studio_and_back(rated, images, tmp_path, capsys):
    assert run("export", rated, tmp_path / "raw.jsonl") == 0
    assert run("export", rated, tmp_path / "tasks.json", "--format=label-studio") == 0
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    (task,) = (task for task in tasks if task["data"]["id"] == "0.png")
    results = [r for a in task["annotations"] for r in a["result"]]
    point = next(r for r in results if r["type"] == "keypointlabels")
    # The middle of pixel 10 of 50 is at 21 %, of pixel 10 of 40 at 26.25 %.
    assert (point["value"]["x"], point["value"]["y"]) == (21, 26.25)
    assert point["value"]["keypointlabels"] == ["implausibility"]
    assert (point["original_width"], point["original_height"]) == (50, 40)
    config = (tmp_path / "tasks.xml").read_text()
    assert {r["from_name"] for r in results} <= set(config.split('"'))
    run("init", tmp_path / "again", "--images", images)
    assert run("import", tmp_path / "again", tmp_path / "tasks.json") == 0
    assert "6 answers taken" in capsys.readouterr().out
    assert run("export", tmp_path / "again", tmp_path / "raw2.jsonl", "--names") == 0
    assert parsed(tmp_path / "raw2.jsonl") == parsed(tmp_path / "raw.jsonl")
    store = Store(tmp_path / "again")
    assert {a.answer["comment"] for a in store.answers()} == {f"a comment of {name}" for name in GIVEN}
    store.close()


@pytest.mark.parametrize("side", [1, 3, 511, 512, 8192])
def test_percents_give_the_same_pixels(side, rng):
    places = [0, side - 1, side - 0.01, *rng.uniform(0, side - 0.01, 50).round(2)]
    for place in places:
        back = transfer._pixels(transfer._percent(place, side), side)
        assert back == pytest.approx(place, abs=1e-6)
        assert back < side
    # A click on the image's very edges stays in the image.
    assert transfer._pixels(0, side) == 0
    assert transfer._pixels(100, side) == side - 0.5


def test_import_of_raw_ratings(rated, images, tmp_path, capsys):
    run("export", rated, tmp_path / "raw.jsonl")
    run("init", tmp_path / "again", "--images", images)
    assert run("import", tmp_path / "again", tmp_path / "raw.jsonl") == 0
    assert run("export", tmp_path / "again", tmp_path / "raw2.jsonl", "--names") == 0
    assert parsed(tmp_path / "raw2.jsonl") == parsed(tmp_path / "raw.jsonl")
    assert "has it already" in run("import", tmp_path / "again", tmp_path / "raw.jsonl")
    further = tmp_path / "further.jsonl"
    line = next(text for text in (tmp_path / "raw.jsonl").read_text().splitlines() if "red cat" in text)
    further.write_text(line.replace("rater-", "another-"))
    assert "3 raters have answered" in run("import", tmp_path / "again", further)
    further.write_text(line.replace("A red cat", "A blue cat"))
    assert "no image of this name, prompt and size" in run("import", tmp_path / "again", further)
    further.write_text("{}")
    assert "further.jsonl:1: image_size is missing. Nothing imported" in run(
        "import", tmp_path / "again", further
    )
    capsys.readouterr()
    run("status", tmp_path / "again")
    assert "2 of 2 images have 3 answers" in capsys.readouterr().out


def test_an_import_has_no_times_and_is_not_the_managers(rated, images, tmp_path, capsys):
    raw, again = tmp_path / "raw.jsonl", tmp_path / "again"
    run("export", rated, raw)
    run("init", again, "--images", images)
    named = raw.read_text().replace('"rater-2"', '"manager"')
    (tmp_path / "named.jsonl").write_text(named)
    shown = run("import", again, tmp_path / "named.jsonl")
    assert ".png: its rater has the manager's name, manager: give it another rater_id" in shown
    assert run("import", again, raw) == 0
    capsys.readouterr()
    run("status", again)
    assert [line.split()[4] for line in capsys.readouterr().out.splitlines()[2:]] == ["–"] * 3
    with contextlib.closing(Store(again)) as store:
        views = manage.item_view(store, store.item("0.png"))["answers"]
        assert [view["seconds"] for view in views] == [None] * 3
    run("export", again, tmp_path / "scores.csv", "--format=scores")
    rows = csv.DictReader((tmp_path / "scores.csv").read_text().splitlines())
    assert {row["seconds"] for row in rows} == {""}
    run("export", again, tmp_path / "tasks.json", "--format=label-studio")
    assert "lead_time" not in (tmp_path / "tasks.json").read_text()
    for action in ("renew", "deactivate"):
        assert "no rater named manager" in run("raters", action, again, "manager")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "no JSON"),
        ("{}", "no list of tasks"),
        ('[{"data": {}}]', "task 1 lacks 'id'"),
        ('[{"data": {"id": "nope"}}]', "task 1: the project has no image nope"),
        ('[{"data": {"id": "0.png"}, "annotations": [{"result": []}]}]', "has no rating of plausibility"),
        ('[{"data": {"id": "0.png"}, "annotations": [{"result": [7]}]}]', "task 1 has an unknown form"),
        (
            '[{"data": {"id": "0.png"}, "annotations": [{"result": [{"from_name": "token_9",'
            ' "type": "choices", "value": {"choices": ["misaligned"]}}]}]}]',
            "token_9 is no token",
        ),
        (
            '[{"data": {"id": "0.png"}, "annotations": [{"result": [{"from_name": "points",'
            ' "type": "keypointlabels", "value": {"x": 1, "y": 1, "keypointlabels": ["nose"]}}]}]}]',
            "unknown label nose",
        ),
        *(
            (
                f'[{{"data": {{"id": "0.png"}}, "annotations": [{{"lead_time": {time}, "result": []}}]}}]',
                "task 1: lead_time must be from 0 to 1,000,000 seconds",
            )
            for time in ('"abc"', "-5", "1e300", "true")
        ),
        (
            '[{"data": {"id": "0.png"}, "annotations": [{"result": [{"from_name": "token_x1",'
            ' "type": "choices", "value": {"choices": ["misaligned"]}}]}]}]',
            "token_x1 is no token",
        ),
    ],
)
def test_a_broken_export_of_label_studio_is_refused(project, tmp_path, text, message):
    (tmp_path / "tasks.json").write_text(text)
    assert message in run("import", project, tmp_path / "tasks.json")


def test_images_are_copied_by_content_and_upright(project, tmp_path, images, capsys):
    picture = Image.new("RGB", (30, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture.save(images / "turned.jpg", exif=exif)
    for name, data in (("svg.png", b"<svg>"), ("dots.png", b"")):
        (images / name).write_bytes(data)
    for name in ("turned.txt", "svg.txt"):
        (images / name).write_text("a prompt")
    (images / "dots.txt").write_text("...")
    assert run("add", project, "--images", images) == commands.SOME_FAILED
    shown = capsys.readouterr()
    assert "1 new images" in shown.out
    assert "left out: svg.png: an SVG picture" in shown.err
    assert "left out: dots.png" in shown.err
    store = Store(project)
    items = {item.id: item for item in store.items()}
    assert items.keys() == {*PROMPTS, "turned.jpg"}
    assert (items["turned.jpg"].width, items["turned.jpg"].height) == (20, 30)
    for item in items.values():
        assert store.image_path(item).parent == project / "images"
        with Image.open(store.image_path(item)) as image:
            assert image.size == (item.width, item.height)
    store.close()


def test_gold_and_order(rated, images, tmp_path, capsys):
    run("export", rated, tmp_path / "raw.jsonl")
    lines = (tmp_path / "raw.jsonl").read_text().splitlines()
    gold = next(line for line in lines if json.loads(line)["image_id"] == "0.png")
    (tmp_path / "gold.jsonl").write_text(gold)
    (tmp_path / "order.csv").write_text("image,prompt,uncertainty\nsub/1.png,x,1.5\nelsewhere.png,x,1\n")
    files = ("--gold", tmp_path / "gold.jsonl", "--order", tmp_path / "order.csv")
    assert run("init", tmp_path / "again", "--images", images, *files) == 0
    store = Store(tmp_path / "again")
    items = {item.id: item for item in store.items()}
    store.close()
    assert items["0.png"].gold == answers.of_rating(ratings.parse_rating(gold))
    assert items["sub/1.png"].gold is None
    assert items["sub/1.png"].priority > items["0.png"].priority
    # Answers on gold images check raters, and are no data.
    assert run("import", tmp_path / "again", tmp_path / "raw.jsonl") == 0
    assert run("export", tmp_path / "again", tmp_path / "out.jsonl") == 0
    assert {image for _, image in parsed(tmp_path / "out.jsonl")} == {"sub/1.png"}
    (tmp_path / "order.csv").write_text("name\nsub/1.png\n")
    assert "no column `image`" in run("add", tmp_path / "again", "--order", tmp_path / "order.csv")
    (tmp_path / "gold.jsonl").write_text(gold.replace("0.png", "nope.png"))
    capsys.readouterr()
    assert run("init", tmp_path / "third", "--images", images, *files[:2]) == commands.SOME_FAILED
    assert "nope.png: a gold answer, but no image" in capsys.readouterr().err


def test_raw_ratings_need_all_parts(rated, tmp_path):
    path = rated / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"words": ""}))
    assert "export with --format=scores" in run("export", rated, tmp_path / "raw.jsonl")
    assert not (tmp_path / "raw.jsonl").exists()
    assert run("export", rated, tmp_path / "scores.csv", "--format=scores") == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rater": 3}, "unknown setting `rater`"),
        ({"raters": 0}, "`raters` must be a whole number from 1 to 1000, got 0"),
        ({"raters": 2.5}, "`raters` must be a whole number"),
        ({"gold_rate": 1}, "`gold_rate` must be a number from 0 to 0.99"),
        ({"lease_minutes": True}, "`lease_minutes` must be a number"),
        ({"point_radius": 20}, "point_radius must be"),
        ({"title": 3}, "`title` must be text"),
        ({"kinds": [{"name": "beauty", "question": "x"}]}, "names in `kinds` must be different ones of"),
        ({"scales": [{"name": "overall", "question": "x", "anchors": ["a"]}]}, "must be 5 texts"),
        ({"kinds": [], "words": "", "scales": []}, "nothing is asked"),
    ],
)
def test_a_wrong_setting_is_named(project, changes, message):
    path = project / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert f"{path}: " in (shown := run("status", project))
    assert message in shown


def test_mistakes_are_one_message(project, images, tmp_path):
    assert "is not empty: name a new directory" in run("init", project, "--images", images)
    assert "no such file or folder" in run("init", tmp_path / "new", "--images", tmp_path / "nope")
    assert "is no project" in run("status", tmp_path)
    assert "no rater named zoe" in run("raters", "renew", project, "zoe")
    assert "no rater named zoe" in run("raters", "deactivate", project, "zoe")
    assert "give --images, --order or --suggest" in run("add", project)
    assert "No such file or directory" in run("export", project, tmp_path / "nope/raw.jsonl")
    assert "No such file or directory" in run("import", project, tmp_path / "nope.jsonl")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["project.db", "config.json", "guidelines.md", "images/new.jsonl"])
def test_a_project_is_not_overwritten_by_what_it_writes(project, name):
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    for verb in ("export", "backup"):
        assert "belongs to" in run(verb, project, project / name)
    assert {path: path.read_bytes() for path in project.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["config.json", "guidelines.md"])
def test_text_files_that_cannot_be_read(project, name):
    (project / name).write_bytes("Grüße".encode("utf-16"))
    assert f"{name}: not in UTF-8" in run("status", project)
    (project / name).unlink()
    assert name in run("status", project)


@pytest.mark.parametrize(
    "arguments", [("serve", "--port=0"), ("serve", "--port=99999"), ("manager", "--url=example.org")]
)
def test_addresses_that_make_no_sense(project, arguments, capsys):
    command_name, flag = arguments
    with pytest.raises(SystemExit) as end:
        command.main([command_name, str(project), flag])
    assert end.value.code == 2
    assert flag.partition("=")[2] in capsys.readouterr().err


def test_an_address_in_use_is_told(project):
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert "can't serve at 127.0.0.1" in run("serve", project, f"--port={other.getsockname()[1]}")
    assert "can't serve at no.such.host.invalid" in run("serve", project, "--host=no.such.host.invalid")


def test_names_of_raters_are_bounded_and_distinct(project):
    assert run("raters", "add", project, "Ann") == 0
    assert "named ann already" in run("raters", "add", project, " ann ")
    assert "at most 100 characters" in run("raters", "add", project, "x" * 101)


def test_errors_of_the_database_are_told(project, monkeypatch):
    def fail(*_):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(Store, "add_rater", fail)
    assert "disk is full. Make room on the disk" in run("raters", "add", project, "Zoe")


def test_gold_needs_images(project, tmp_path):
    assert "--gold is for images that are added" in run("add", project, "--gold", tmp_path / "gold.jsonl")
