"""A rater's work in the database: the next item, drafts, finished answers, and the first round."""

import json
import math
import sqlite3
from typing import Any

from richhf_jax.annotate import answers as forms
from richhf_jax.annotate import assignment, records
from richhf_jax.annotate.items import Items
from richhf_jax.annotate.records import Closed, Conflict, Incomplete, NotYours, Person, Progress, Work
from richhf_jax.inputs.record import printable

# Raters who skip an item, or call it broken, until it goes to the manager.
_SKIPS = 2
_DONE = (
    "(SELECT count(*) FROM answers WHERE item = items.number AND answers.state = 'done' AND excluded IS NULL)"
)
_SKIPPED = (
    "(SELECT count(DISTINCT person) FROM answers WHERE item = items.number"
    " AND answers.state IN ('skipped', 'broken') AND excluded IS NULL)"
)


class RaterWork(Items):
    """The part of a store that gives items to raters and takes their answers."""

    def next_item(self, person: Person) -> Work | None:
        """Gives a rater their open draft, or else the next item. Renews its lease.

        The first round comes first. Returns None where nothing is left for this rater now.
        """
        now = self._clock()
        with self._database.transaction() as db:
            for row in self._rows(db, "answers.person = ? AND answers.state = 'draft'", person.id):
                if self._has_place(db, row, now):
                    self._lease(db, row["id"], now)
                    return records.work(row)
            me = db.execute("SELECT * FROM people WHERE id = ?", (person.id,)).fetchone()
            left = [] if me["passed"] else self._calibration_left(db, me)
            number = left[0] if left else assignment.next_number(db, self.config, person.id, now)
            if number is None:
                return None
            self._insert(db, number, person.id, me["round"] if left else 0, bool(left), now)
            row = self._mine(db, person, number)
            self._lease(db, row["id"], now)
            return records.work(row)

    def _insert(
        self, db: sqlite3.Connection, number: int, person: int, attempt: int, is_calibration: bool, now: float
    ) -> None:
        """Makes an empty draft, without a lease."""
        prompt = db.execute("SELECT prompt FROM items WHERE number = ?", (number,)).fetchone()[0]
        db.execute(
            "INSERT INTO answers"
            " (item, person, round, is_calibration, state, answer, started, changed, expires)"
            " VALUES (?, ?, ?, ?, 'draft', ?, ?, ?, 0)",
            (number, person, attempt, is_calibration, _dump(forms.empty(prompt)), now, now),
        )

    def work(self, person: Person, item_id: str) -> Work:
        """Returns an item that was given to a rater, with their answer.

        Raises:
          NotYours: it was never given to them.
        """
        with self._database.connection() as db:
            return records.work(self._mine(db, person, item_id))

    def save(self, person: Person, item_id: str, revision: int, answer: forms.Answer, seconds: float) -> int:
        """Saves a draft and renews its lease. Returns its new revision.

        Args:
          person: the rater.
          item_id: the item.
          revision: the revision that the answer was made from.
          answer: see `answers`.
          seconds: time spent on the item in all.

        Raises:
          NotYours: the item isn't open for this rater.
          Conflict: the answer has another revision.
          answers.InvalidAnswer: the answer has another form.
        """
        with self._database.transaction() as db:
            row = self._open(db, person, item_id, revision)
            return self._write(db, row, "draft", answer, seconds)

    def finish(
        self, person: Person, item_id: str, revision: int, answer: forms.Answer, seconds: float
    ) -> dict[str, Any] | None:
        """Ends a rater's work on an item. The same answer again changes nothing.

        Where the item has a suggestion, the first answer ends nothing: it is kept, the rater sees the
        suggestion, and what they then answer counts. Who knows a draft's revision after the first answer has
        got the suggestion, for every reply with the one holds the other.

        Args: as `save`.

        Returns:
          In the first round {"score": 0 to 1, "answer": the right one, "left": items left in the round,
          "passed": bool, or None before its end}. Who fails begins a new round. After the first answer
          {"suggestion": the model's, "revision": the draft's}. Else None.

        Raises:
          NotYours, Conflict, answers.InvalidAnswer: as `save`.
          Incomplete: parts of the answer are missing.
        """
        with self._database.transaction() as db:
            row = self._mine(db, person, item_id)
            answer = forms.checked(answer, row["prompt"], records.size(row))
            # The reply may have been lost, and the page sends the same again.
            if row["state"] == "done" and json.loads(row["answer"]) == answer:
                return self._feedback(db, row, row["score"])
            if self._is_resent(row, revision, answer):
                return {"suggestion": records.parsed(row["shown"]), "revision": row["revision"]}
            row = self._open(db, person, item_id, revision)
            if missing := forms.missing(answer, self.config):
                raise Incomplete(missing)
            is_first = row["first"] is None
            has_more = is_first and row["suggestion"] is not None and not row["is_calibration"]
            revision = self._write(db, row, "draft" if has_more else "done", answer, seconds)
            score = None
            # A rater is judged by what they saw themselves.
            if row["gold"] is not None and is_first:
                score = forms.gold_score(answer, json.loads(row["gold"]), self.config, row["height"])
                db.execute("UPDATE answers SET score = ? WHERE id = ?", (score, row["id"]))
            if has_more:
                db.execute(
                    "UPDATE answers SET first = answer, shown = ? WHERE id = ?",
                    (row["suggestion"], row["id"]),
                )
                return {"suggestion": records.parsed(row["suggestion"]), "revision": revision}
            self._fill(db, row["number"])
            if row["is_calibration"]:
                self._end_round(db, person)
            return self._feedback(db, row, score)

    def _is_resent(self, row: sqlite3.Row, revision: int, answer: forms.Answer) -> bool:
        """Tells whether a first answer comes again, because the page missed the reply to it."""
        return (
            row["state"] == "draft"
            and row["first"] is not None
            and row["revision"] == revision + 1
            and json.loads(row["answer"]) == answer
        )

    def skip(self, person: Person, item_id: str, revision: int, reason: str, broken: bool) -> None:
        """Ends a rater's work on an item without an answer. The same again changes nothing.

        An item that a second rater skips, or calls broken, goes to the manager.

        Raises:
          NotYours, Conflict: as `save`.
          answers.InvalidAnswer: the reason is too long.
        """
        if len(reason) > forms.MAX_COMMENT:
            raise forms.InvalidAnswer(f"a reason must have at most {forms.MAX_COMMENT} characters")
        state, reason = "broken" if broken else "skipped", printable(reason)
        with self._database.transaction() as db:
            row = self._mine(db, person, item_id)
            # As in `finish`: the reply may have been lost.
            if (row["state"], row["reason"]) == (state, reason):
                return
            row = self._open(db, person, item_id, revision)
            db.execute(
                "UPDATE answers SET state = ?, reason = ?, changed = ?, revision = revision + 1,"
                " score = coalesce(score, ?) WHERE id = ?",
                # Nobody passes the first round by skipping it.
                (state, reason, self._clock(), 0.0 if row["is_calibration"] else None, row["id"]),
            )
            db.execute(
                f"UPDATE items SET state = 'manager' WHERE number = ? AND {_SKIPPED} >= ?",
                (row["number"], _SKIPS),
            )
            if row["is_calibration"]:
                self._end_round(db, person)

    def progress(self, person: Person) -> Progress:
        """Returns how far a rater is."""
        with self._database.connection() as db:
            done, seconds = db.execute(
                "SELECT count(*) FILTER (WHERE state = 'done' AND NOT is_calibration), total(seconds)"
                " FROM answers WHERE person = ?",
                (person.id,),
            ).fetchone()
            opened = db.execute(
                "SELECT count(*) FROM items WHERE state = 'open' AND gold IS NULL"
            ).fetchone()[0]
            mine = db.execute(
                "SELECT count(*) FROM answers JOIN items ON items.number = answers.item"
                " WHERE answers.person = ? AND answers.state != 'draft' AND items.state = 'open'"
                " AND items.gold IS NULL",
                (person.id,),
            ).fetchone()[0]
            me = db.execute("SELECT * FROM people WHERE id = ?", (person.id,)).fetchone()
            drafts = db.execute(
                "SELECT count(*) FROM answers WHERE person = ? AND state = 'draft' AND is_calibration",
                (person.id,),
            ).fetchone()[0]
            left = 0 if me["passed"] else len(self._calibration_left(db, me)) + drafts
            return Progress(done, opened - mine, seconds, left)

    def _rows(self, db: sqlite3.Connection, condition: str, *values: Any) -> list[sqlite3.Row]:
        """Returns answers beside their items, the newest first."""
        return db.execute(
            f"{records.ANSWERS_BESIDE_ITEMS} WHERE {condition} ORDER BY answers.id DESC", values
        ).fetchall()

    def _mine(self, db: sqlite3.Connection, person: Person, item: int | str) -> sqlite3.Row:
        """Returns a rater's newest answer on an item, named by its number or id, beside the item."""
        column = "items.number" if isinstance(item, int) else "items.id"
        rows = self._rows(db, f"answers.person = ? AND {column} = ?", person.id, item)
        if not rows:
            raise NotYours
        return rows[0]

    def _open(self, db: sqlite3.Connection, person: Person, item_id: str, revision: int) -> sqlite3.Row:
        """Returns a rater's draft that has the given revision and still a place."""
        row = self._mine(db, person, item_id)
        if row["revision"] != revision:
            suggestion = records.parsed(row["shown"]) if row["state"] == "draft" else None
            raise Conflict(row["revision"], json.loads(row["answer"]), suggestion)
        if row["state"] != "draft" or not self._has_place(db, row, self._clock()):
            raise Closed
        return row

    def _has_place(self, db: sqlite3.Connection, row: sqlite3.Row, now: float) -> bool:
        """Tells whether others have left a draft its place.

        A first answer has taken it. A lease that runs keeps the place against other leases, not against
        answers: two may run for one place after the clock went back or `raters` was lowered, and then who
        answers first takes it.
        """
        if row["gold"] is not None:
            return True
        since = math.inf if row["expires"] > now or row["first"] is not None else now
        return assignment.other_places(db, row["item"], row["person"], since) < self.config.raters

    def _lease(self, db: sqlite3.Connection, answer_id: int, now: float) -> None:
        # An item that was given to a rater by the manager has a longer lease.
        db.execute(
            "UPDATE answers SET expires = max(expires, ?) WHERE id = ?",
            (now + 60 * self.config.lease_minutes, answer_id),
        )

    def _write(
        self, db: sqlite3.Connection, row: sqlite3.Row, state: str, answer: forms.Answer, seconds: float
    ) -> int:
        if not (math.isfinite(seconds) and seconds >= 0):
            raise forms.InvalidAnswer(f"`seconds` must be a positive number, got {seconds}")
        now, revision = self._clock(), row["revision"] + 1
        db.execute(
            "UPDATE answers SET state = ?, answer = ?, revision = ?, seconds = max(seconds, ?), changed = ?"
            " WHERE id = ?",
            (
                state,
                _dump(forms.checked(answer, row["prompt"], records.size(row))),
                revision,
                seconds,
                now,
                row["id"],
            ),
        )
        self._lease(db, row["id"], now)
        return revision

    # The first round.

    def _calibration_left(self, db: sqlite3.Connection, me: sqlite3.Row) -> list[int]:
        """Returns the numbers of the first round's items that a rater hasn't got yet."""
        had = db.execute(
            "SELECT item FROM answers WHERE person = ? AND round = ? AND is_calibration",
            (me["id"], me["round"]),
        )
        known = {row[0] for row in had}
        return [n for n in assignment.calibration_numbers(db, self.config) if n not in known]

    def _end_round(self, db: sqlite3.Connection, person: Person) -> None:
        """Decides, after a round's last item, whether the rater has passed or begins a new one."""
        me = db.execute("SELECT * FROM people WHERE id = ?", (person.id,)).fetchone()
        if me["passed"] or self._calibration_left(db, me):
            return
        mean = db.execute(
            "SELECT avg(score) FROM answers WHERE person = ? AND round = ? AND is_calibration",
            (person.id, me["round"]),
        ).fetchone()[0]
        passed = mean >= self.config.calibration_threshold
        db.execute(
            "UPDATE people SET passed = ?, round = round + ? WHERE id = ?", (passed, not passed, person.id)
        )

    def _feedback(
        self, db: sqlite3.Connection, row: sqlite3.Row, score: float | None
    ) -> dict[str, Any] | None:
        if not row["is_calibration"]:
            return None
        me = db.execute("SELECT * FROM people WHERE id = ?", (row["person"],)).fetchone()
        is_end = me["passed"] or me["round"] != row["round"]
        left = 0 if is_end else len(self._calibration_left(db, me))
        passed = bool(me["passed"]) if is_end else None
        return {"score": score, "answer": json.loads(row["gold"]), "left": left, "passed": passed}

    # An item's places.

    def _fill(self, db: sqlite3.Connection, number: int | None = None) -> None:
        """Takes an item out of the open ones where it has all answers; without a number each such item."""
        which = "TRUE" if number is None else "number = :number"
        db.execute(
            f"UPDATE items SET state = 'full' WHERE {which} AND state = 'open' AND gold IS NULL"
            f" AND {_DONE} >= :raters",
            {"number": number, "raters": self.config.raters},
        )

    def _end_first_answers(self, db: sqlite3.Connection) -> None:
        """Lets first answers count whose raters didn't end their work before the lease expired.

        They were given without a suggestion, so they become answers as on an item that has none.
        """
        db.execute(
            "UPDATE answers SET state = 'done', answer = first, first = NULL, shown = NULL,"
            " revision = revision + 1 WHERE state = 'draft' AND first IS NOT NULL AND expires <= ?",
            (self._clock(),),
        )
        self._fill(db)

    def _reopen(self, db: sqlite3.Connection) -> None:
        """Opens full items that lack answers, and those of the manager that too few raters have skipped.

        For an answer was excluded, or `raters` was raised.
        """
        db.execute(
            "UPDATE items SET state ="
            f" CASE WHEN gold IS NULL AND {_DONE} >= :raters THEN 'full' ELSE 'open' END"
            f" WHERE state = 'full' AND {_DONE} < :raters OR state = 'manager' AND {_SKIPPED} < :skips",
            {"raters": self.config.raters, "skips": _SKIPS},
        )


def _dump(answer: forms.Answer) -> str:
    return json.dumps(answer, allow_nan=False)
