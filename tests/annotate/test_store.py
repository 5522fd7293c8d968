"""The store: what is acknowledged stays, two tabs never overwrite, and exactly k answers an item."""

import collections
import contextlib
import json
import os
import pathlib
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

from richhf_jax import errors
from richhf_jax.annotate import answers, database, project
from richhf_jax.annotate.records import Closed, Conflict, Incomplete, Item, NotYours
from richhf_jax.annotate.store import Store


class Clock:
    def __init__(self):
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


def item(i: int, **changes) -> Item:
    return Item(
        **{"id": f"{i}.png", "prompt": "a red cat", "file": "x.png", "width": 64, "height": 48, **changes}
    )


def full(answer: dict, rating: int = 3, **changes) -> dict:
    """An answer that is complete: nothing is marked."""
    nothing, ratings = dict.fromkeys(answer["nothing"], True), dict.fromkeys(answer["ratings"], rating)
    return {**answer, "nothing": nothing, "ratings": ratings, **changes}


GOLD = full(answers.empty("a red cat"))


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def make(tmp_path, clock):
    """Makes a project with items and named raters; returns the store and the persons."""
    with contextlib.ExitStack() as stack:

        def make(items, names="a", **settings):
            config = project.Config(**settings)
            given = [item(i) for i in range(items)] if isinstance(items, int) else items
            store = Store.create(tmp_path / "project", config, given, clock)
            stack.callback(store.close)
            return store, *(store.person(store.add_rater(name)) for name in names)

        yield make


def answer_next(store, person, rating: int = 3):
    """Answers a rater's next item. Returns the work, or None if there is none."""
    if work := store.next_item(person):
        store.finish(person, work.item.id, work.revision, full(work.answer, rating), 5.0)
    return work


def test_a_rater_works_through_all_items(make):
    store, ann = make(4)
    assert store.progress(ann).total_open == 4
    ids = [answer_next(store, ann).item.id for _ in range(4)]
    assert sorted(ids) == [f"{i}.png" for i in range(4)]
    assert store.next_item(ann) is None
    progress = store.progress(ann)
    assert (progress.done, progress.total_open, progress.seconds) == (4, 0, 20.0)


def test_a_draft_is_resumed_with_what_was_saved(make):
    store, ann = make(3)
    work = store.next_item(ann)
    answer = {
        **work.answer,
        "implausibility_points": [[1.5, 2.0]],
        "token_labels": [1, 0, 1],
        "comment": "<b>",
    }
    assert store.save(ann, work.item.id, 0, answer, 2.5) == 1
    again = store.next_item(ann)
    assert (again.item, again.answer, again.revision, again.seconds) == (work.item, answer, 1, 2.5)
    assert store.work(ann, work.item.id) == again


def test_two_tabs_never_overwrite(make):
    store, ann = make(1)
    work = store.next_item(ann)
    first, second = ({**work.answer, "comment": comment} for comment in ("first", "second"))
    store.save(ann, work.item.id, 0, first, 1)
    for write in (store.save, store.finish):
        with pytest.raises(Conflict) as caught:
            write(ann, work.item.id, 0, full(second), 1)
        assert (caught.value.revision, caught.value.answer) == (1, first)
    with pytest.raises(Conflict):
        store.skip(ann, work.item.id, 0, "why", False)
    assert store.work(ann, work.item.id).answer == first


def test_an_end_is_an_end_and_may_be_sent_twice(make):
    store, ann = make(1)
    work = store.next_item(ann)
    answer = full(work.answer)
    store.finish(ann, work.item.id, 0, answer, 1)
    store.finish(ann, work.item.id, 0, answer, 1)  # The reply was lost.
    with pytest.raises(Conflict):
        store.finish(ann, work.item.id, 0, full(answer, 4), 1)
    with pytest.raises(Closed):
        store.save(ann, work.item.id, 1, full(answer, 4), 1)
    assert [a.answer for a in store.answers()] == [answer]


def test_an_empty_answer_must_be_meant(make):
    store, ann = make(1)
    work = store.next_item(ann)
    with pytest.raises(Incomplete) as caught:
        store.finish(ann, work.item.id, 0, work.answer, 1)
    assert caught.value.missing == [
        *("implausibility", "misalignment", "words"),
        *("plausibility", "alignment", "aesthetics", "overall"),
    ]
    marked = full(work.answer, misalignment_points=[[3, 4]]) | {
        "nothing": dict.fromkeys(work.answer["nothing"], False)
    }
    with pytest.raises(Incomplete) as caught:
        store.finish(ann, work.item.id, 0, marked, 1)
    assert caught.value.missing == ["implausibility", "words"]
    assert store.work(ann, work.item.id).revision == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"implausibility_points": [[64, 1]]}, "outside"),
        ({"implausibility_points": [[float("nan"), 1]]}, "JSON"),
        ({"implausibility_points": [[1]]}, r"\[x, y\]"),
        ({"misalignment_points": [[1, 1]] * 1001}, "at most 1000"),
        ({"token_labels": [1, 1]}, "2 token_labels but 3"),
        ({"token_labels": [1, 1, 2]}, "must be 0"),
        ({"token_labels": [True, True, True]}, "must be 0"),
        ({"ratings": {"plausibility": 6, "alignment": 1, "aesthetics": 1, "overall": 1}}, "1 to 5, got 6"),
        ({"ratings": {"plausibility": 1}}, "`ratings`"),
        ({"nothing": {"implausibility": 1, "misalignment": True, "words": True}}, "true or false"),
        ({"comment": "x" * 10_001}, "at most 10000"),
        ({"further": 1}, "an answer must be"),
    ],
)
def test_an_answer_of_another_form_is_refused(make, changes, message):
    store, ann = make(1)
    work = store.next_item(ann)
    for write in (store.save, store.finish):
        with pytest.raises(answers.InvalidAnswer, match=message):
            write(ann, work.item.id, 0, {**full(work.answer), **changes}, 1)
    with pytest.raises(answers.InvalidAnswer, match="seconds"):
        store.save(ann, work.item.id, 0, work.answer, float("nan"))
    assert store.work(ann, work.item.id).revision == 0


def test_others_items_are_out_of_reach(make):
    store, ann, bob = make(2, "ab")
    work = store.next_item(ann)
    other = next(i.id for i in store.items() if i.id != work.item.id)
    for person, name in ((ann, other), (bob, work.item.id), (ann, "../project.db")):
        for call in (
            lambda p, n: store.work(p, n),
            lambda p, n: store.save(p, n, 0, work.answer, 1),
            lambda p, n: store.finish(p, n, 0, full(work.answer), 1),
            lambda p, n: store.skip(p, n, 0, "", True),
        ):
            with pytest.raises(NotYours):
                call(person, name)


def test_secrets_are_kept_as_hashes(make, tmp_path):
    store, *_ = make(1)
    secret, lead = store.add_rater("bob"), store.make_manager()
    assert len(secret) == 22  # 128 bits in base64
    assert (store.person(secret).name, store.person(secret).is_manager) == ("bob", False)
    assert store.person(lead).is_manager
    assert store.person(secret[:-1]) is None
    assert store.person("\udc80") is None
    store.close()
    contents = b"".join(p.read_bytes() for p in (tmp_path / "project").iterdir() if p.is_file())
    assert secret.encode() not in contents
    assert lead.encode() not in contents
    renewed = store.renew("bob")
    assert store.person(secret) is None
    assert store.person(renewed).name == "bob"
    store.make_manager()
    assert store.person(lead) is None
    with pytest.raises(errors.UserError, match="a person named bob already"):
        store.add_rater("bob")


def test_a_lease_expires_and_the_item_goes_to_another(make, clock):
    store, ann, bob = make(1, "ab", raters=1, lease_minutes=10)
    work = store.next_item(ann)
    assert store.next_item(bob) is None
    clock.now += 9 * 60
    store.save(ann, work.item.id, 0, work.answer, 1)  # renews it
    clock.now += 9 * 60
    assert store.next_item(bob) is None
    assert store.next_item(ann).item == work.item  # renews it, too
    clock.now += 9 * 60
    assert store.next_item(bob) is None
    clock.now += 2 * 60
    answer_next(store, bob)
    with pytest.raises(Closed):
        store.finish(ann, work.item.id, 1, full(work.answer), 1)
    assert store.next_item(ann) is None
    assert [a.person.name for a in store.answers()] == ["b"]


def test_a_clock_that_goes_back_brings_no_answer_too_many(make, clock):
    store, ann, bob, cid = make(1, "abc", raters=1)
    work = store.next_item(ann)
    clock.now += 3700
    assert store.next_item(bob).item == work.item
    clock.now -= 3700
    # Both leases run: the first answer takes the place.
    assert store.next_item(ann)
    assert store.next_item(bob)
    store.finish(bob, work.item.id, 0, full(work.answer), 1)
    assert store.next_item(ann) is store.next_item(cid) is None
    for write in (store.save, store.finish):
        with pytest.raises(Closed):
            write(ann, work.item.id, 0, full(work.answer), 1)
    assert [a.person.name for a in store.answers()] == ["b"]


def test_who_comes_late_goes_on_where_nobody_took_the_place(make, clock):
    store, ann = make(1, raters=1)
    work = store.next_item(ann)
    clock.now += 1e6
    store.finish(ann, work.item.id, 0, full(work.answer), 1)
    assert len(list(store.answers())) == 1


def test_what_two_skip_goes_to_the_manager_and_back(make):
    store, ann, bob, cid = make(1, "abc")
    for person, broken in ((ann, False), (bob, True)):
        work = store.next_item(person)
        assert store.for_manager() == []
        store.skip(person, work.item.id, 0, "too dark", broken)
    assert store.for_manager() == ["0.png"]
    assert store.next_item(cid) is None
    found = [(a.state, a.reason) for a in store.answers(finished=False)]
    assert found == [("skipped", "too dark"), ("broken", "too dark")]
    store.reassign("0.png", ann.id)
    assert store.for_manager() == []
    for person in (ann, cid):
        assert answer_next(store, person)
    assert store.next_item(bob) is None  # Who skipped it doesn't get it again.
    with pytest.raises(errors.UserError, match="has answered"):
        store.reassign("0.png", ann.id)


def test_an_excluded_answer_is_kept_and_another_rater_gives_one(make):
    store, ann, bob = make(1, "ab", raters=1)
    answer_next(store, ann)
    assert store.next_item(bob) is None
    (answer,) = store.answers()
    store.exclude(answer.id, "guessed")
    answer_next(store, bob)
    assert [(a.person.name, a.excluded) for a in store.answers()] == [("a", "guessed"), ("b", None)]
    with pytest.raises(KeyError):
        store.exclude(99, "")


def test_a_deactivated_rater_frees_what_is_open(make):
    store, ann, bob = make(1, "ab", raters=1)
    store.next_item(ann)
    store.deactivate(ann.id)
    assert [p.active for p in store.people()] == [False, True]
    assert answer_next(store, bob)


def test_commands_on_raters_leave_the_manager_alone(make):
    store, ann = make(1)
    secret = store.make_manager()
    manager = store.person(secret)
    for call in (store.renew, store.rater):
        with pytest.raises(errors.UserError, match="no rater named manager"):
            call("manager")
    store.deactivate(manager.id)
    assert store.person(secret) == manager
    assert store.rater(" a ") == ann


def test_more_answers_may_be_asked_later(make, tmp_path):
    store, ann, bob = make(2, "ab", raters=1)
    for _ in range(2):
        answer_next(store, ann)
    assert store.next_item(bob) is None
    path = tmp_path / "project/config.json"
    path.write_text(path.read_text().replace('"raters": 1', '"raters": 2'))
    again = Store(tmp_path / "project")
    assert answer_next(again, bob)
    again.close()


def test_fewer_answers_may_be_asked_later(make, tmp_path, clock):
    store, ann, bob, cid = make(2, "abc", raters=3)
    answer_next(store, ann)
    (given,) = store.answers()
    while (work := store.next_item(bob)).item.id != given.item.id:
        answer_next(store, bob)
    left = next(i.id for i in store.items() if i.id != given.item.id)
    path = tmp_path / "project/config.json"
    path.write_text(path.read_text().replace('"raters": 3', '"raters": 1'))
    with contextlib.closing(Store(tmp_path / "project", clock)) as again:
        # Bob's lease runs, but the image has its answer.
        with pytest.raises(Closed):
            again.finish(bob, given.item.id, work.revision, full(work.answer), 1)
        done = len(list(again.answers()))
        assert again.progress(cid).total_open == 2 - done
        while work := again.next_item(cid):
            assert work.item.id == left
            answer_next(again, cid)
        assert collections.Counter(a.item.id for a in again.answers()) == {"0.png": 1, "1.png": 1}


def test_exactly_k_answers_an_item_with_many_raters_at_once(make):
    names = [f"r{i}" for i in range(12)]
    store, *people = make(12, names)
    problems = []

    def work_on(person):
        try:
            while work := store.next_item(person):
                revision = store.save(person, work.item.id, work.revision, work.answer, 1)
                store.finish(person, work.item.id, revision, full(work.answer), 2)
        except Exception as error:  # A thread's error would be lost.
            problems.append(error)

    threads = [threading.Thread(target=work_on, args=(person,)) for person in people]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    counts = collections.Counter(a.item.id for a in store.answers())
    assert counts == {f"{i}.png": 3 for i in range(12)}
    pairs = collections.Counter((a.item.id, a.person.id) for a in store.answers(finished=False))
    assert set(pairs.values()) == {1}


def test_raters_have_their_own_orders_and_the_seed_repeats_them(make, tmp_path):
    store, ann, bob = make(12, "ab")
    orders = [[answer_next(store, person).item.id for _ in range(12)] for person in (ann, bob)]
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])
    again = Store.create(tmp_path / "again", project.Config(), [item(i) for i in range(12)])
    person = again.person(again.add_rater("a"))
    assert [answer_next(again, person).item.id for _ in range(12)] == orders[0]
    again.close()


def test_items_of_higher_priority_come_first(make):
    store, ann = make(20)
    assert store.prioritise(["7.png", "3.png", "unknown"]) == 2
    assert [answer_next(store, ann).item.id for _ in range(2)] == ["7.png", "3.png"]
    store.prioritise(["5.png"])
    assert answer_next(store, ann).item.id == "5.png"


def test_the_first_round_gives_feedback_and_must_be_passed(make):
    golds = [item(i, gold=GOLD) for i in range(2)]
    store, ann = make([*golds, item(2)], calibration_items=2, calibration_threshold=0.8)
    assert store.progress(ann).calibration_left == 2

    def turn(rating):
        work = store.next_item(ann)
        assert work.is_calibration
        return store.finish(ann, work.item.id, work.revision, full(work.answer, rating), 1)

    # Three parts of seven are right: both kinds of points and the words.
    wrong = turn(5)
    assert wrong == {"score": 3 / 7, "answer": GOLD, "left": 1, "passed": None}
    assert store.progress(ann).calibration_left == 1
    assert turn(5)["passed"] is False
    assert store.progress(ann).calibration_left == 2
    # One step off is still right.
    assert turn(4)["score"] == 1
    assert turn(3) == {"score": 1, "answer": GOLD, "left": 0, "passed": True}
    assert store.progress(ann).calibration_left == 0
    work = store.next_item(ann)
    assert (work.item.id, work.is_calibration) == ("2.png", False)


def test_gold_items_are_mixed_in_at_a_rate(make):
    items = [item(i, gold=GOLD if i < 40 else None) for i in range(90)]
    store, ann, bob = make(items, "ab", calibration_items=0, gold_rate=0.25, raters=1)
    done = []
    while work := store.next_item(ann):
        assert store.finish(ann, work.item.id, 0, full(work.answer), 1) is None
        done.append(work.item.gold is not None)
    assert len(done) - sum(done) == 50
    # 50 * 0.25 / 0.75 = 17 are expected, with a standard deviation of 4.7.
    assert 3 <= sum(done) <= 31
    # No other image is left.
    assert store.progress(bob).total_open == 0
    assert store.next_item(bob) is None
    # Another rater gets the same ones, too, though one answer an item is wanted.
    store.add_items(item(i) for i in range(90, 140))
    theirs = []
    while work := answer_next(store, bob):
        theirs.append(work.item.gold is not None)
    assert (len(theirs) - sum(theirs), theirs[-1]) == (50, False)
    assert 3 <= sum(theirs) <= 31
    assert {a.score for a in store.answers() if a.item.gold} == {1.0}


def test_points_on_gold_count_if_their_disks_overlap():
    config = project.Config(scales=(), words="")
    gold = {**GOLD, "implausibility_points": [[100, 100], [200, 200]]}
    ours = {**GOLD, "implausibility_points": [[110, 100], [112, 100], [100, 190]]}
    # Radius 400 / 20 = 20: one hit of three and two points; the other kind is empty in both.
    assert answers.gold_score(ours, gold, config, 400) == (2 / 5 + 1) / 2


def test_an_image_can_be_added_twice_but_not_changed(make):
    store, ann = make(2)
    assert store.add_items([item(1), item(2)]) == 1
    with pytest.raises(errors.UserError, match=r"0\.png: the project has another image or prompt"):
        store.add_items([item(3), item(0, prompt="a dog")])
    assert [i.id for i in store.items()] == ["0.png", "1.png", "2.png"]
    work = store.next_item(ann)
    with pytest.raises(errors.UserError, match="can't become a gold item"):
        store.add_items([item(int(work.item.id[0]), gold=GOLD)])


def test_what_is_no_project_is_refused(tmp_path, make):
    with pytest.raises(errors.UserError, match="is no project: it lacks"):
        Store(tmp_path)
    make(1)
    folder = tmp_path / "project"
    with pytest.raises(errors.UserError, match="is there already"):
        Store.create(folder, project.Config(), [])
    with contextlib.closing(sqlite3.connect(folder / "project.db")) as db:
        db.execute(f"PRAGMA user_version = {database.PROJECT.version + 1}")
    with pytest.raises(errors.UserError, match=r"newer richhf_jax \(schema 5, here 4\): update"):
        Store(folder)
    for path in folder.glob("project.db*"):
        path.unlink()
    (folder / "project.db").write_bytes(b"no database" * 1000)
    with pytest.raises(errors.UserError, match="file is not a database"):
        Store(folder)


def test_an_older_database_gets_the_new_index(make, tmp_path):
    make(1)[0].close()
    path = tmp_path / "project" / "project.db"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("DROP INDEX answers_of_person")
        db.execute("CREATE INDEX answers_of_person ON answers (person, state)")
        db.execute("DROP TABLE site")
        db.execute("PRAGMA user_version = 2")
    Store(path.parent).close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        columns = [row[2] for row in db.execute("PRAGMA index_info(answers_of_person)")]
        assert columns == ["person", "state", "is_calibration", "seconds", "item"]
        assert db.execute("PRAGMA user_version").fetchone() == (database.PROJECT.version,)


def test_each_project_has_a_name_of_its_own_that_stays(make, tmp_path):
    store, _ = make(1)
    with contextlib.closing(Store.create(tmp_path / "other", project.Config(), [item(0)])) as other:
        assert store.site_id() != other.site_id()
        name = other.site_id()
        assert len(store.site_id()) == len(name) == 16
    with contextlib.closing(Store(tmp_path / "other")) as again:
        assert again.site_id() == name


def test_a_full_disk_changes_nothing(make):
    store, ann = make(1)
    work = store.next_item(ann)
    with store._database.connection() as db:
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages}")
    large = {**work.answer, "implausibility_points": [[i / 20, 1] for i in range(1000)]}
    with pytest.raises(sqlite3.OperationalError, match="full"):
        store.save(ann, work.item.id, 0, large, 1)
    assert store.work(ann, work.item.id) == work
    assert store.save(ann, work.item.id, 0, {**work.answer, "comment": "ok"}, 1) == 1


def test_backup_while_raters_work(make, tmp_path):
    store, ann = make(30)
    end = threading.Event()

    def rate():
        while not end.is_set() and answer_next(store, ann):
            pass

    thread = threading.Thread(target=rate)
    thread.start()
    try:
        store.backup(tmp_path / "copy.db")
    finally:
        end.set()
        thread.join()
    folder = tmp_path / "restored"
    folder.mkdir()
    (tmp_path / "copy.db").rename(folder / "project.db")
    project.write_config(folder, store.config)
    restored = Store(folder)
    assert len(list(restored.items())) == 30
    assert [a.id for a in restored.answers()] == [a.id for a in store.answers()][
        : len(list(restored.answers()))
    ]
    restored.close()


KILLED = """
import json, sys
from richhf_jax.annotate.store import Store
store = Store(sys.argv[1])
person = store.person(sys.argv[2])
print("ready", flush=True)
while True:
    work = store.next_item(person)
    for step in range(1, 4):
        answer = {**work.answer, "comment": f"{work.item.id} {step}"}
        revision = store.save(person, work.item.id, step - 1, answer, step)
        print(json.dumps([work.item.id, revision, answer["comment"]]), flush=True)
    answer["nothing"] = dict.fromkeys(answer["nothing"], True)
    answer["ratings"] = dict.fromkeys(answer["ratings"], 3)
    store.finish(person, work.item.id, revision, answer, 9)
    print(json.dumps([work.item.id, revision + 1, "done"]), flush=True)
"""


def test_what_was_acknowledged_survives_sigkill(make, tmp_path):
    store, _ = make(2000)
    secret = store.add_rater("killed")
    person = store.person(secret)
    generator = random.Random(0)
    acknowledged = {}
    for _ in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, tmp_path / "project", secret],
            stdout=subprocess.PIPE,
            text=True,
            cwd=pathlib.Path(__file__).parents[2],
        ) as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(generator.uniform(0.02, 0.3))
            os.kill(process.pid, signal.SIGKILL)
            lines = process.stdout.read().splitlines()
        for line in lines:
            name, revision, comment = json.loads(line)
            acknowledged[name] = revision, comment
        for name, (revision, comment) in acknowledged.items():
            work = store.work(person, name)
            assert work.revision >= revision
            if comment == "done":
                assert work.state == "done"
            elif work.revision == revision:
                assert work.answer["comment"] == comment
        # The next process begins with a fresh item.
        draft = store.next_item(person)
        store.skip(person, draft.item.id, draft.revision, "killed", False)
    assert len(acknowledged) > 4
