"""The store: exactly k answers a pair, leases, balance, sides, checks of attention."""

import collections
import contextlib
import math
import threading

import numpy as np
import pytest

from richhf_jax.annotate.records import Closed, Conflict, NotYours
from richhf_jax.survey import statistics
from richhf_jax.survey.answers import IDENTICAL, SWAPPED, AnswerError
from richhf_jax.survey.store import CHECK_DISTANCE, Store


def answer_next(store, person, choose=lambda work: 2):
    if work := store.next_pair(person):
        store.finish(person, work.token, work.revision, choose(work), 5.0)
    return work


def answer_all(store, *people, choose=lambda work: 2):
    """Lets raters answer in turn until nothing is left for any of them."""
    while [person for person in people if answer_next(store, person, choose)]:
        pass


def answers_of(store):
    return [one.answer for one in store.given() if not one.answer.check]


def test_each_pair_gets_exactly_k_answers_of_different_raters(make):
    store, *people = make(8, "abcde", raters=3, check_rate=0.3)
    threads = [threading.Thread(target=answer_all, args=(store, person)) for person in people]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    given = collections.Counter(a.prompt_id for a in answers_of(store))
    assert given == {f"{i:04}": 3 for i in range(8)}
    assert len({a.key() for a in answers_of(store)}) == 24
    assert store.counts() == (8, 8)
    assert [store.next_pair(person) for person in people] == [None] * 5


def test_pairs_of_three_generators_are_balanced_and_raters_spread(make):
    store, *people = make(8, "abcdef", generators=3, raters=2, check_rate=0)
    answer_all(store, *people)
    by_pair = collections.Counter((a.prompt_id, frozenset((a.left, a.right))) for a in answers_of(store))
    assert len(by_pair) == 8 * 3
    assert set(by_pair.values()) == {2}
    # Six places on a prompt, six raters: each has one, but for what chance leaves at the end.
    by_rater = collections.Counter((a.prompt_id, a.rater_id) for a in answers_of(store))
    assert max(by_rater.values()) <= 2
    assert sum(count == 1 for count in by_rater.values()) >= 40


def test_sides_are_about_half_and_recorded_as_shown(make, sides):
    store, ann, bob = make(50, "ab", check_rate=0.2)
    shown = {}

    def choose(person):
        def note(work):
            shown[person.known_as(False), work.prompt, work.token] = sides(store, person, work)
            return 1

        return note

    for person in (ann, bob):
        answer_all(store, person, choose=choose(person))
    recorded = collections.Counter(
        (one.answer.rater_id, one.answer.prompt, one.answer.left, one.answer.right) for one in store.given()
    )
    assert recorded == collections.Counter((rater, prompt, *two) for (rater, prompt, _), two in shown.items())
    lefts = [a.left == "tuned_7" for a in answers_of(store)]
    # Standard deviation 5 of 100.
    assert 35 <= sum(lefts) <= 65
    # Each rater has sides of their own.
    own = [
        {a.prompt_id: a.left for a in answers_of(store) if a.rater_id == r} for r in ("rater-1", "rater-2")
    ]
    assert 14 <= sum(own[0][p] != own[1][p] for p in own[0]) <= 36


def test_each_survey_has_a_name_of_its_own(make):
    store, ann = make(1)
    name = store.site_id()
    with store._database.transaction() as db:
        # As an older version made it.
        db.execute("DROP TABLE site")
        db.execute("PRAGMA user_version = 1")
    with contextlib.closing(Store(store.folder)) as again:
        assert again.site_id() != name
        assert again.next_pair(ann)


def test_a_clock_that_goes_back_brings_no_answer_too_many(make, clock):
    store, ann, bob = make(1, "ab", raters=1)
    work = store.next_pair(ann)
    clock.now += 3700
    theirs = store.next_pair(bob)
    clock.now -= 3700
    # Both leases run: the first answer takes the place.
    assert store.next_pair(ann)
    assert store.next_pair(bob)
    store.finish(bob, theirs.token, 0, 2, 1.0)
    assert store.next_pair(ann) is None
    for write in (store.save, store.finish):
        with pytest.raises(Closed):
            write(ann, work.token, 0, 2, 1.0)
    assert store.progress(ann) == (0, 0)
    assert [a.rater_id for a in answers_of(store)] == ["rater-2"]


def test_a_lease_expires_and_may_be_renewed_while_a_place_is_free(make, clock):
    store, ann, bob = make(1, "ab", raters=1, lease_minutes=10)
    work = store.next_pair(ann)
    assert store.next_pair(bob) is None
    clock.now += 599
    assert store.save(ann, work.token, 0, 4, 1.0) == 1
    clock.now += 599
    assert store.next_pair(bob) is None
    clock.now += 2
    theirs = store.next_pair(bob)
    with pytest.raises(Closed):
        store.save(ann, work.token, 1, 5, 2.0)
    assert store.next_pair(ann) is None
    # Bob leaves it, too.
    clock.now += 601
    mine = store.next_pair(ann)
    assert (mine.token, mine.answer, mine.revision) == (work.token, 4, 1)
    store.finish(ann, work.token, 1, 4, 2.0)
    with pytest.raises(Closed):
        store.finish(bob, theirs.token, 0, 4, 2.0)


def test_checks_are_recorded_as_the_schema_wants_and_come_late(make, sides):
    store, ann = make(60, "a", check_rate=0.5)
    order = []

    def choose(work):
        order.append((work.prompt, sides(store, ann, work)))
        return 3

    answer_all(store, ann, choose=choose)
    checks = [one.answer for one in store.given() if one.answer.check]
    # A check comes with probability 1/2 where a prompt is left for one: 50 of 105 are possible.
    assert {IDENTICAL, SWAPPED} == {check.check for check in checks}
    kinds = collections.Counter(check.check for check in checks)
    assert min(kinds.values()) >= 0.2 * len(checks)
    assert 25 <= len(checks) <= 60
    assert len({check.prompt_id for check in checks}) == len(checks)
    first = {}
    found = collections.Counter()
    for place, (prompt, two) in enumerate(order):
        if prompt not in first:
            first[prompt] = place, two
            continue
        before, seen = first[prompt]
        assert place - before >= CHECK_DISTANCE
        if two[0] == two[1]:
            found[IDENTICAL] += 1
        else:
            assert two == seen[::-1]
            found[SWAPPED] += 1
    assert found == kinds
    # All answers were "about the same": all checks are passed.
    result = statistics.checks([one.answer for one in store.given()])["rater-1"]
    assert result["answers"] == 60
    assert {name: result[name] for name in kinds} == {
        name: {"passed": count, "asked": count} for name, count in kinds.items()
    }


def test_the_last_answer_may_be_corrected_and_no_earlier_one(make):
    store, ann, bob = make(4, "ab", check_rate=0)
    with pytest.raises(NotYours):
        store.previous(ann)
    first = answer_next(store, ann)
    second = answer_next(store, ann)
    third = store.next_pair(ann)
    last = store.previous(ann)
    assert (last.token, last.answer, last.state) == (second.token, 2, "done")
    revision = store.save(ann, last.token, last.revision, 5, 9.0)
    store.finish(ann, last.token, revision, 5, 9.0)
    assert [one.answer.answer for one in store.given()] == [2, 5]
    assert store.next_pair(ann).token == third.token
    with pytest.raises(Closed):
        store.save(ann, first.token, 1, 5, 9.0)
    with pytest.raises(Closed):
        store.skip(ann, second.token, revision, "late")
    for token in (second.token, "none"):
        with pytest.raises(NotYours):
            store.save(bob, token, revision, 1, 9.0)
        with pytest.raises(NotYours):
            store.image_path(bob, token, "left")


def test_revisions_and_repeated_requests(make):
    store, ann = make(2)
    work = store.next_pair(ann)
    assert store.save(ann, work.token, 0, 4, 3.0) == 1
    with pytest.raises(Conflict) as conflict:
        store.save(ann, work.token, 0, 1, 3.0)
    assert (conflict.value.revision, conflict.value.answer) == (1, 4)
    store.finish(ann, work.token, 1, 4, 2.0)
    store.finish(ann, work.token, 1, 4, 2.0)
    [one] = store.given()
    assert (one.answer.answer, one.seconds) == (4, 3.0)
    for answer, seconds in ((0, 1.0), (6, 1.0), (3, math.nan), (3, -1.0)):
        with pytest.raises(AnswerError):
            store.save(ann, work.token, 2, answer, seconds)


def test_a_skipped_pair_goes_to_others(make):
    store, ann, bob = make(1, "ab", raters=1)
    work = store.next_pair(ann)
    store.skip(ann, work.token, 0, "hurts \ud800 my eyes")
    assert store.next_pair(ann) is None
    assert store.skips() == {ann.id: 1}
    assert answer_next(store, bob)
    assert store.counts() == (1, 1)


def test_more_raters_a_pair_open_it_again(make):
    store, ann, bob = make(1, "ab", raters=1)
    answer_next(store, ann)
    assert store.next_pair(bob) is None
    file = store.folder / "config.json"
    file.write_text(file.read_text().replace('"raters": 1', '"raters": 2'))
    again = Store(store.folder)
    assert again.counts() == (0, 1)
    assert again.next_pair(bob)
    again.close()


def test_the_result_has_the_preferences_of_simulated_raters(make, sides):
    """Raters prefer "tuned_7" in 70 % of the pairs, and tie in 10 %: a win rate of 75 %."""
    store, *people = make(75, "abcd", raters=4, check_rate=0.1)
    rng = np.random.default_rng(3)

    def choose(person):
        def prefer(work):
            left, right = sides(store, person, work)
            if left == right:
                return 3
            better = rng.choice([1, 2, 3, 4, 5], p=[0.3, 0.4, 0.1, 0.15, 0.05])
            return int(better if left == "tuned_7" else 6 - better)

        return prefer

    for person in people:
        answer_all(store, person, choose=choose(person))
    # 300 answers have 300 / 9 = 33 checks, with a standard deviation of 6.
    assert 15 <= sum(bool(one.answer.check) for one in store.given()) <= 51
    [pair] = statistics.result([one.answer for one in store.given()], ["tuned_7", "plain_1"])["pairs"]
    assert pair["answers"] == 300
    # Three standard deviations of the means of 300 answers, of which one has 0.41 and a share at most 0.49.
    assert pair["win_rate"] == pytest.approx(0.75, abs=0.07)
    assert pair["shares"] == pytest.approx([0.3, 0.4, 0.1, 0.15, 0.05], abs=0.085)
