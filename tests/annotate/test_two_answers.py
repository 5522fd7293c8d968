"""A rater answers, sees a suggestion, and answers again: what is kept, and what is never told before."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
from selenium.webdriver.common.keys import Keys
from starlette.testclient import TestClient

from richhf_jax import errors, feedback
from richhf_jax.annotate import database, manage, project, server, transfer
from richhf_jax.annotate.records import Closed, Conflict, Incomplete
from richhf_jax.annotate.store import Store

SUGGESTION = {
    "implausibility_points": [[123.25, 77.75]],
    "misalignment_points": [],
    "ratings": {"plausibility": 2, "overall": 4},
}
# No other text of the page has it.
MARK = "123.25"
NAME = "train/0.png"
ORIGIN = {"Origin": "http://testserver"}


@pytest.fixture
def make(make_store):
    """Makes a store whose images have a suggestion, with named raters."""
    with contextlib.ExitStack() as stack:

        def make(names="a", **settings):
            store = stack.enter_context(
                contextlib.closing(make_store(**{"suggestion": SUGGESTION} | settings))
            )
            return store, *(store.person(store.add_rater(name)) for name in names)

        yield make


def full(work, rating: int = 3, **changes) -> dict:
    nothing = dict.fromkeys(work.answer["nothing"], True)
    return work.answer | {"nothing": nothing, "ratings": dict.fromkeys(feedback.SCORES, rating)} | changes


def begin(store, person):
    """Gives the first answer to the next image. Returns it, and the image's work after it."""
    work = store.next_item(person)
    first = full(work)
    found = store.finish(person, work.item.id, work.revision, first, 5.0)
    assert found == {"suggestion": work.item.suggestion, "revision": work.revision + 1}
    return first, store.work(person, work.item.id)


def test_the_last_answer_counts_and_the_first_is_kept(make):
    store, ann = make()
    assert store.next_item(ann).suggestion is None
    first, work = begin(store, ann)
    assert (work.state, work.suggestion, work.answer) == ("draft", SUGGESTION, first)
    assert store.progress(ann).done == 0
    assert list(store.answers()) == []
    last = first | {"implausibility_points": [[1.5, 2]]}
    revision = store.save(ann, NAME, 1, last, 7.0)
    # Whoever comes back sees the suggestion again, and their own changes.
    again = store.next_item(ann)
    assert (again.item.id, again.answer, again.suggestion, again.revision) == (NAME, last, SUGGESTION, 2)
    assert store.finish(ann, NAME, revision, last, 8.0) is None
    (found,) = store.answers()
    assert (found.answer, found.first, found.shown, found.seconds) == (last, first, SUGGESTION, 8.0)
    assert found.is_changed
    assert store.next_item(ann).suggestion is None


def test_the_manager_sees_how_many_answers_change(make):
    store, ann = make()
    for changes in ({"comment": "as before"}, {"misalignment_points": [[1, 2]]}):
        first, work = begin(store, ann)
        store.finish(ann, work.item.id, 1, first | changes, 9.0)
    work = store.next_item(ann)
    values = manage.agreement(store)
    assert (values["suggested"], values["changed"]) == (2, 1)
    with TestClient(server.make_app(store)) as client:
        client.get(f"/m/{store.make_manager()}")
        assert (
            "Of 2 answers on images with a model's suggestion, 1 were" in client.get("/manage/agreement").text
        )


def test_an_incomplete_answer_is_no_first_one(make):
    store, ann = make()
    work = store.next_item(ann)
    with pytest.raises(Incomplete):
        store.finish(ann, NAME, 0, work.answer, 1.0)
    assert store.next_item(ann) == work


def test_lost_replies_change_nothing(make):
    store, ann = make()
    first, work = begin(store, ann)
    assert store.finish(ann, NAME, 0, first, 5.0) == {"suggestion": SUGGESTION, "revision": 1}
    assert store.work(ann, NAME) == work
    assert store.finish(ann, NAME, 1, first, 6.0) is None
    assert store.finish(ann, NAME, 1, first, 6.0) is None
    assert [a.first for a in store.answers()] == [first]


def test_a_second_tab_ends_nothing_that_it_has_not_shown(make):
    store, ann = make()
    work = store.next_item(ann)
    store.save(ann, NAME, 0, work.answer, 1.0)
    with pytest.raises(Conflict) as caught:
        store.save(ann, NAME, 0, work.answer, 1.0)
    assert caught.value.suggestion is None
    first = full(work)
    store.finish(ann, NAME, 1, first, 1.0)
    for write in (store.save, store.finish):
        with pytest.raises(Conflict) as caught:
            write(ann, NAME, 1, full(work, 5), 1.0)
        assert (caught.value.answer, caught.value.suggestion) == (first, SUGGESTION)
    # Nor does the first answer, sent again, bring back what was changed after it.
    store.save(ann, NAME, 2, first | {"comment": "changed"}, 1.0)
    with pytest.raises(Conflict):
        store.finish(ann, NAME, 2, first, 1.0)
    with pytest.raises(Conflict):
        store.finish(ann, NAME, 1, first, 1.0)
    assert list(store.answers()) == []


def test_a_lease_that_expires_between_the_answers(make):
    store, ann, bob = make("ab", raters=1, lease_minutes=10)
    clock = [1e9]
    store._clock = lambda: clock[0]
    first, _ = begin(store, ann)
    clock[0] += 9 * 60
    assert store.next_item(ann).suggestion  # renews it
    clock[0] += 9 * 60
    assert store.next_item(bob).item.id != NAME
    clock[0] += 100 * 60
    # A first answer keeps its place: the rater goes on.
    with pytest.raises(errors.UserError, match="has all its answers"):
        store.reassign(NAME, bob.id)
    store.skip(bob, store.next_item(bob).item.id, 0, "why", False)
    assert store.next_item(bob).item.id != NAME
    revision = store.save(ann, NAME, 1, full(store.work(ann, NAME), 5), 1.0)
    clock[0] += 100 * 60
    # Who doesn't come back has given the first answer, without a suggestion.
    assert manage.overview(store)["raters"][0]["done"] == 1
    with pytest.raises(Closed):
        store.save(ann, NAME, revision + 1, first, 1.0)
    (kept,) = store.answers(False, NAME)
    assert (kept.state, kept.answer, kept.first, kept.shown) == ("done", first, None, None)
    assert [a.item.id for a in transfer.counted(store, first=True)] == [NAME]
    store.exclude(kept.id, "guessed")
    store.reassign(NAME, bob.id)


def test_a_first_answer_keeps_its_place_when_the_clock_goes_back(make):
    store, ann, bob = make("ab", raters=1)
    clock = [1e9]
    store._clock = lambda: clock[0]
    assert store.next_item(ann).item.id == NAME
    clock[0] += 3700
    work = store.next_item(bob)
    assert work.item.id == NAME
    clock[0] -= 3700
    begin(store, ann)
    for write in (store.save, store.finish):
        with pytest.raises(Closed):
            write(bob, NAME, 0, full(work), 1.0)


def test_opening_a_project_lets_first_answers_count(make):
    store, ann = make(raters=1)
    first, _ = begin(store, ann)
    for now, kept in ((time.time(), []), (time.time() + 3700, [first])):
        with contextlib.closing(Store(store.folder, lambda now=now: now)) as again:
            assert [a.answer for a in again.answers()] == kept
            assert again.progress(ann).total_open == 3 - len(kept)


def test_another_suggestion_does_not_replace_what_was_seen(make):
    store, ann = make()
    first, _ = begin(store, ann)
    item = store.item(NAME)
    other = {"ratings": {"overall": 1}}
    store.add_items([type(item)(**vars(item) | {"suggestion": other})])
    assert store.item(NAME).suggestion == other
    assert store.next_item(ann).suggestion == SUGGESTION
    store.finish(ann, NAME, 1, first, 1.0)
    assert [a.shown for a in store.answers()] == [SUGGESTION]


def test_the_first_round_has_no_suggestions(make):
    store, ann = make(gold=True, calibration_items=1)
    work = store.next_item(ann)
    assert work.is_calibration
    found = store.finish(ann, work.item.id, 0, full(work), 1.0)
    assert found["passed"] is not None
    assert [(a.first, a.shown) for a in store.answers()] == [(None, None)]


@pytest.mark.parametrize("end", ["done", "skipped"])
def test_gold_counts_the_first_answer(make, end):
    store, ann = make(gold=True, calibration_items=0, gold_rate=0.99)
    first, work = begin(store, ann)
    assert work.item.gold
    # One step off on each scale; the point is missing, the rest is right: six parts of seven.
    if end == "done":
        store.finish(ann, NAME, 1, full(work, 1, implausibility_points=[[300, 300]] * 9), 1.0)
    else:
        store.skip(ann, NAME, 1, "why", False)
    (found,) = store.answers(finished=False)
    assert (found.state, found.score, found.first) == (end, 6 / 7, first)


def test_an_image_without_a_suggestion_has_one_answer(make):
    store, ann = make(suggestion=None)
    work = store.next_item(ann)
    assert store.finish(ann, NAME, 0, full(work), 1.0) is None
    assert [(a.first, a.shown, a.is_changed) for a in store.answers()] == [(None, None, False)]


KILLED = """
import json, sys, time
from richhf_jax.annotate.store import Store
store = Store(sys.argv[1])
ann = store.person(sys.argv[2])
work = store.next_item(ann)
first = json.loads(sys.argv[3])
found = store.finish(ann, work.item.id, 0, first, 1.0)
print(found["revision"], flush=True)
time.sleep(60)
"""


def test_a_first_answer_survives_sigkill(make):
    store, _ = make()
    secret = store.add_rater("killed")
    person = store.person(secret)
    first = full(store.next_item(person))
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, store.folder, secret, json.dumps(first)],
        stdout=subprocess.PIPE,
        cwd=pathlib.Path(__file__).parents[2],
    ) as process:
        assert process.stdout.readline() == b"1\n"
        os.kill(process.pid, signal.SIGKILL)
    work = store.next_item(person)
    assert (work.answer, work.suggestion, work.revision) == (first, SUGGESTION, 1)
    store.finish(person, NAME, 1, work.answer, 1.0)
    assert [a.first for a in store.answers()] == [first]


# Databases of the first schema.


@pytest.fixture
def old(tmp_path):
    """A project that the first version of the database made."""
    folder = tmp_path / "old"
    folder.mkdir()
    project.write_config(folder, project.Config(calibration_items=1))
    text = (pathlib.Path(__file__).parent / "schema1.sql").read_text()
    with contextlib.closing(sqlite3.connect(folder / project.DATABASE)) as db:
        db.executescript(f"PRAGMA journal_mode = WAL; {text}")
    return folder


def schema_of(folder) -> tuple[int, list[str]]:
    with contextlib.closing(sqlite3.connect(folder / project.DATABASE)) as db:
        columns = db.execute(
            "SELECT m.name || '.' || c.name FROM sqlite_master m, pragma_table_info(m.name) c"
            " WHERE m.type = 'table' ORDER BY m.name, c.cid"
        )
        return db.execute("PRAGMA user_version").fetchone()[0], [row[0] for row in columns]


def test_an_older_database_is_upgraded(old, make):
    new, _ = make()
    with contextlib.closing(Store(old)) as store:
        states = [(a.item.id, a.state, a.answer["comment"]) for a in store.answers(finished=False)]
        assert [state for _, state, _ in states] == ["done", "done", "skipped", "draft"]
        assert all(a.first is a.shown is None for a in store.answers(finished=False))
        # An open draft goes on, with a suggestion that comes now.
        [ann] = [person for person in store.people() if not person.is_manager]
        work = store.next_item(ann)
        assert (work.item.id, work.answer["comment"], work.revision) == ("3.png", "half", 1)
        items = [type(item)(**vars(item) | {"suggestion": {}}) for item in store.items()]
        assert store.add_items(items) == 0
        assert store.finish(ann, "3.png", 1, full(work), 1.0) == {"suggestion": {}, "revision": 2}
        store.finish(ann, "3.png", 2, full(work), 1.0)
        name = store.site_id()
    assert schema_of(old) == schema_of(new.folder)
    with contextlib.closing(Store(old)) as store:
        assert [a.shown for a in store.answers()] == [None, None, {}]
        assert store.site_id() == name != new.site_id()


def test_an_upgrade_is_whole_or_nothing(old, monkeypatch):
    before = schema_of(old)
    with monkeypatch.context() as patch:
        first, *_ = database.PROJECT.additions[0]
        broken = ((first, "ALTER TABLE nowhere ADD COLUMN x"),)
        patch.setattr(database, "PROJECT", dataclasses.replace(database.PROJECT, additions=broken))
        with pytest.raises(errors.UserError, match="no such table: nowhere"):
            Store(old)
        assert schema_of(old) == before
    problems = []

    def open_it():
        try:
            Store(old).close()
        except Exception as error:  # A thread's error would be lost.
            problems.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert schema_of(old)[0] == database.PROJECT.version


# The server and the page.


def exchange(client, name: str, work: dict) -> list:
    """Answers an image, with all that may go wrong; returns (what the server replied, its status) of each."""
    path = f"/api/items/{name.replace('/', '%2F')}"
    answer = work["answer"]
    complete = answer | {
        "nothing": dict.fromkeys(answer["nothing"], True),
        "ratings": dict.fromkeys(feedback.SCORES, 3),
    }

    def send(method, end, revision, answer):
        body = {"revision": revision, "answer": answer, "seconds": 1}
        return client.request(method, path + end, json=body, headers=ORIGIN)

    return [
        send("POST", "/done", 0, answer),
        send("PUT", "", 0, answer),
        send("PUT", "", 0, answer),
        send("POST", "/done", 0, complete),
        send("PUT", "", 1, {}),
        client.get("/api/next"),
        client.get(f"/image/{name}"),
        client.get("/"),
        # From here on the rater has answered.
        send("POST", "/done", 1, complete),
        client.get("/api/next"),
        send("PUT", "", 0, complete),
        send("PUT", "", 2, complete),
        send("POST", "/done", 3, complete),
        send("POST", "/done", 3, complete),
    ]


STATUSES = [422, 200, 409, 409, 400, 200, 200, 200, 200, 200, 409, 200, 200, 200]
# Where the suggestion is told.
TOLD = [False] * 8 + [True] * 3 + [False] * 3


def test_nothing_is_told_before_the_first_answer_and_gold_looks_like_any_other(make):
    store, *_ = make(gold=True, calibration_items=0, gold_rate=0.99)
    secret = store.add_rater("rater")
    shapes = []
    with TestClient(server.make_app(store)) as client:
        page = client.get(f"/r/{secret}")
        for name in (NAME, "train/1.png"):
            first = client.get("/api/next")
            assert MARK not in page.text + first.text
            work = first.json()["work"]
            assert (work["id"], work["suggestion"]) == (name, None)
            replies = exchange(client, name, work)
            assert [reply.status_code for reply in replies] == STATUSES
            assert [MARK in reply.text for reply in replies] == TOLD
            assert [MARK in str(reply.headers) for reply in replies] == [False] * len(replies)
            bodies = [r.json() for r in (first, *replies) if "json" in r.headers["Content-Type"]]
            shapes.append([shape(body) for body in bodies])
    assert [item.gold is None for item in store.items()] == [False, True, True]
    assert shapes[0] == shapes[1]


def shape(value):
    """Keeps the names of a reply's fields and the types of their values."""
    if isinstance(value, dict):
        return {name: shape(part) for name, part in value.items()}
    return type(value).__name__


def gold_of(page) -> tuple[list, list]:
    """Returns the circles and the steps that the page shows as another's."""
    circles = page.run(
        "return [...document.querySelectorAll('#gold circle')]"
        ".map((circle) => [circle.cx, circle.cy].map((value) => value.baseVal.value))"
    )
    steps = page.run(
        "return [...document.querySelectorAll('.likert .gold input')]"
        ".map((field) => field.name + field.value)"
    )
    return circles, steps


SHOWN = ([[123.25, 77.75]], ["plausibility2", "overall4"])


def test_the_page_shows_it_after_enter_and_again_after_a_reload(make_page, make_site):
    page = make_page(make_site(suggestion=SUGGESTION))
    page.open()
    assert gold_of(page) == ([], [])
    page.type("n3333", Keys.ENTER)
    page.wait(lambda: page.find("#feedback").is_displayed())
    assert page.find("#feedback-title").text == "The model's suggestion"
    assert page.find("#feedback-lines").text.splitlines() == [
        "implausibility: 1 point",
        "misalignment: no point",
        "It doesn't say: misaligned words, alignment, aesthetics.",
    ]
    assert gold_of(page) == SHOWN
    assert not page.find("[data-action=next]").is_displayed()
    first = page.work(NAME).answer
    page.click(123, 78)
    page.type("s2")
    page.wait_until_saved()
    page.reload()
    assert page.find("#feedback").is_displayed()
    assert gold_of(page) == SHOWN
    assert page.find("[name=plausibility]:checked").get_attribute("value") == "2"
    page.type(Keys.ENTER)
    page.wait(lambda: "1 done" in page.find("#count").text)
    page.wait(lambda: "dogs" in page.find("#words").text)
    assert not page.find("#feedback").is_displayed()
    assert gold_of(page) == ([], [])
    (found,) = page.site.store.answers()
    assert found.first == first
    assert found.answer["ratings"] == dict.fromkeys(feedback.SCORES, 3) | {"plausibility": 2}
    assert len(found.answer["implausibility_points"]) == 1
    # The second image: the answer is kept as it was.
    page.type("n4444", Keys.ENTER)
    page.wait(lambda: page.find("#feedback").is_displayed())
    page.type(Keys.ENTER)
    page.wait(lambda: "2 done" in page.find("#count").text)
    assert [a.is_changed for a in page.site.store.answers()] == [True, False]


LOSE = """
const real = window.fetch;
window.fetch = async (path, options) => {
  const reply = await real(path, options);
  if (!path.endsWith("/done")) return reply;
  window.fetch = real;
  throw new TypeError("lost");
};"""


def test_a_reply_that_is_lost_shows_it_with_the_next_change(make_page, make_site):
    page = make_page(make_site(suggestion=SUGGESTION))
    page.open()
    page.type("n3333")
    page.wait_until_saved()
    page.run(LOSE)
    page.type(Keys.ENTER)
    page.wait(lambda: "try again" in page.find("#missing").text)
    assert page.work(NAME).suggestion == SUGGESTION
    page.click(300, 300)
    page.wait(lambda: page.find("#feedback").is_displayed())
    assert not page.find("#conflict").is_displayed()
    assert gold_of(page) == SHOWN
    page.wait_until_saved()
    page.type(Keys.ENTER)
    page.wait(lambda: "1 done" in page.find("#count").text)
    assert [len(a.answer["implausibility_points"]) for a in page.site.store.answers()] == [1]
    # The browser itself logs the conflict.
    assert ["409" in line["message"] for line in page.driver.get_log("browser")] == [True]
