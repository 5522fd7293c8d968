"""The store of a project: who rates which item, and the answers.

A method that returns has its change on the disk; see `database`. A disk without room is an
sqlite3.OperationalError, and changes nothing.
"""

import json
import math
import pathlib
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from richhf_jax import errors, writing
from richhf_jax.annotate import answers as forms
from richhf_jax.annotate import assignment, database, project, records
from richhf_jax.annotate.people import People
from richhf_jax.annotate.records import (
    Answer,
    Closed,
    Conflict,
    Incomplete,
    Item,
    NotYours,
    Person,
    Progress,
    Work,
)
from richhf_jax.datasets import ratings
from richhf_jax.foreign_text import for_terminal
from richhf_jax.inputs.record import printable

# Raters who skip an item, or call it broken, until it goes to the manager.
_SKIPS = 2
# An item that the manager gives to a rater is kept for them for a week.
_GIVEN_SECONDS = 7 * 24 * 3600
_DONE = (
    "(SELECT count(*) FROM answers WHERE item = items.number AND answers.state = 'done' AND excluded IS NULL)"
)


class Store(People):
    """A project's database. All times are those of `clock`, in seconds since 1970."""

    def __init__(self, folder: str | pathlib.Path, clock: Callable[[], float] = time.time):
        """Opens a project.

        Raises:
          errors.UserError: the folder is no project, its settings are wrong, or a newer version made it.
        """
        self.folder = pathlib.Path(folder)
        self.config = project.read_config(self.folder)
        self._clock = clock
        path = self.folder / project.DATABASE
        try:
            super().__init__(database.Database(path))
            with self._database.transaction() as db:
                self._reopen(db)
        except sqlite3.Error as error:
            raise errors.UserError(
                f"{path}: {error}. Give the right to write the folder, or restore the file from a backup"
            ) from error

    @classmethod
    def create(
        cls,
        folder: str | pathlib.Path,
        config: project.Config,
        items: Iterable[Item],
        clock: Callable[[], float] = time.time,
    ) -> "Store":
        """Makes the database and the settings' files in a folder, which is made if it isn't there.

        Raises:
          errors.UserError: the folder has a database already.
          OSError: it can't be written.
        """
        place = pathlib.Path(folder)
        writing.make_folder(place)
        database.create(place / project.DATABASE)
        project.write_config(place, config)
        store = cls(place, clock)
        store.add_items(items)
        return store

    def close(self) -> None:
        """Closes the database."""
        self._database.close()

    def backup(self, path: pathlib.Path) -> None:
        """Copies the database to a file; see `database.Database.backup`."""
        self._database.backup(path)

    # Items.

    def add_items(self, items: Iterable[Item]) -> int:
        """Adds items, all or none. Returns how many are new.

        One that is there with the same prompt and file isn't new; it gets the gold answer if it has none.

        Raises:
          errors.UserError: an item of this id is there with another prompt or file, or a gold answer comes
            for an item that has been rated.
        """
        with self._database.transaction() as db:
            return sum(self._add_item(db, item) for item in items)

    def _add_item(self, db: sqlite3.Connection, item: Item) -> bool:
        gold = None if item.gold is None else json.dumps(item.gold)
        known = db.execute("SELECT * FROM items WHERE id = ?", (item.id,)).fetchone()
        if known is None:
            db.execute(
                "INSERT INTO items (id, prompt, file, width, height, gold, priority)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (item.id, item.prompt, item.file, item.width, item.height, gold, item.priority),
            )
            return True
        if (known["prompt"], known["file"]) != (item.prompt, item.file):
            raise errors.UserError(
                f"{for_terminal(item.id)}: the project has another image or prompt of this id: give"
                " another id"
            )
        is_rated = db.execute("SELECT 1 FROM answers WHERE item = ? LIMIT 1", (known["number"],)).fetchone()
        if gold is not None and known["gold"] is None and is_rated:
            raise errors.UserError(
                f"{for_terminal(item.id)}: raters have it already, so it can't become a gold item: leave it"
                " out"
            )
        db.execute("UPDATE items SET gold = coalesce(gold, ?) WHERE number = ?", (gold, known["number"]))
        return False

    def prioritise(self, names: Sequence[str]) -> int:
        """Gives these items priority, the first the highest, and all others none. Returns their number."""
        with self._database.transaction() as db:
            db.execute("UPDATE items SET priority = 0")
            ranked = [(len(names) - i, name) for i, name in enumerate(names)]
            return db.executemany("UPDATE items SET priority = ? WHERE id = ?", ranked).rowcount

    def items(self) -> Iterator[Item]:
        """Yields all items, in the order in which they were added."""
        with self._database.connection() as db:
            yield from map(records.item, db.execute("SELECT * FROM items ORDER BY number"))

    def item(self, item_id: str) -> Item | None:
        """Returns an item; None where there is none of this id."""
        with self._database.connection() as db:
            row = db.execute("SELECT * FROM items WHERE id = ?", (item_id,)).fetchone()
        return row and records.item(row)

    def image_path(self, item: Item) -> pathlib.Path:
        """Returns the path of an item's image."""
        return self.folder / project.IMAGES / item.file

    # A rater's work.

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

        Args: as `save`.

        Returns:
          In the first round {"score": 0 to 1, "answer": the right one, "left": items left in the round,
          "passed": bool, or None before its end}, else None. Who fails begins a new round.

        Raises:
          NotYours, Conflict, answers.InvalidAnswer: as `save`.
          Incomplete: parts of the answer are missing.
        """
        with self._database.transaction() as db:
            row = self._mine(db, person, item_id)
            # The reply may have been lost, and the page sends the same again.
            if row["state"] == "done" and json.loads(row["answer"]) == answer:
                return self._feedback(db, row, row["score"])
            row = self._open(db, person, item_id, revision)
            if missing := forms.missing(forms.checked(answer, row["prompt"], records.size(row)), self.config):
                raise Incomplete(missing)
            self._write(db, row, "done", answer, seconds)
            score = None
            if row["gold"] is not None:
                score = forms.gold_score(answer, json.loads(row["gold"]), self.config, row["height"])
                db.execute("UPDATE answers SET score = ? WHERE id = ?", (score, row["id"]))
            self._fill(db, row["number"])
            if row["is_calibration"]:
                self._end_round(db, person)
            return self._feedback(db, row, score)

    def skip(self, person: Person, item_id: str, revision: int, reason: str, broken: bool) -> None:
        """Ends a rater's work on an item without an answer.

        An item that a second rater skips, or calls broken, goes to the manager.

        Raises:
          NotYours, Conflict: as `save`.
        """
        with self._database.transaction() as db:
            row = self._open(db, person, item_id, revision)
            db.execute(
                "UPDATE answers SET state = ?, reason = ?, changed = ?, revision = revision + 1, score = ?"
                " WHERE id = ?",
                (
                    "broken" if broken else "skipped",
                    printable(reason),
                    self._clock(),
                    None if row["gold"] is None else 0.0,
                    row["id"],
                ),
            )
            skips = db.execute(
                "SELECT count(DISTINCT person) FROM answers WHERE item = ? AND excluded IS NULL"
                " AND state IN ('skipped', 'broken')",
                (row["number"],),
            ).fetchone()[0]
            if skips >= _SKIPS:
                db.execute("UPDATE items SET state = 'manager' WHERE number = ?", (row["number"],))
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
            raise Conflict(row["revision"], json.loads(row["answer"]))
        if row["state"] != "draft" or not self._has_place(db, row, self._clock()):
            raise Closed
        return row

    def _has_place(self, db: sqlite3.Connection, row: sqlite3.Row, now: float) -> bool:
        """Tells whether a draft's lease runs, or can be renewed because others left a place."""
        if row["expires"] > now or row["gold"] is not None:
            return True
        return assignment.other_places(db, row["item"], row["person"], now) < self.config.raters

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

    # The manager's part.

    def answers(self, finished: bool = True, item_id: str | None = None) -> Iterator[Answer]:
        """Yields answers in the order in which they were begun.

        Args:
          finished: leaves out those of other states than "done".
          item_id: leaves out those on other items.
        """
        conditions = "(NOT ? OR answers.state = 'done') AND (? IS NULL OR items.id = ?)"
        with self._database.connection() as db:
            people = {row["id"]: records.person(row) for row in db.execute("SELECT * FROM people")}
            query = f"{records.ANSWERS_BESIDE_ITEMS} WHERE {conditions} ORDER BY answers.id"
            for row in db.execute(query, (finished, item_id, item_id)):
                yield records.answer(row, people[row["person"]])

    def for_manager(self) -> list[str]:
        """Returns the ids of the items that two raters skipped or called broken."""
        with self._database.connection() as db:
            rows = db.execute("SELECT id FROM items WHERE state = 'manager' ORDER BY number")
            return [row[0] for row in rows]

    def exclude(self, answer_id: int, reason: str) -> None:
        """Makes an answer not count. It is kept, and its item gets another one.

        Raises:
          KeyError: there is no such answer.
        """
        with self._database.transaction() as db:
            changed = db.execute(
                "UPDATE answers SET excluded = ? WHERE id = ?", (printable(reason), answer_id)
            ).rowcount
            if not changed:
                raise KeyError(answer_id)
            self._reopen(db)

    def add_answers(self, given: Iterable[tuple[ratings.Rating, str, float]]) -> int:
        """Adds finished answers from elsewhere, all or none.

        Raters who aren't known are added, without a link.

        Args:
          given: (rating, comment, seconds spent) of each answer.

        Returns:
          The number of answers.

        Raises:
          errors.UserError: the project hasn't such an image, or it has all its answers or one of this rater.
        """
        count, now = 0, self._clock()
        with self._database.transaction() as db:
            for rating, comment, seconds in given:
                self._add_answer(db, rating, forms.of_rating(rating) | {"comment": comment}, seconds, now)
                count += 1
        return count

    def _add_answer(
        self,
        db: sqlite3.Connection,
        rating: ratings.Rating,
        answer: forms.Answer,
        seconds: float,
        now: float,
    ) -> None:
        name, place = rating.rater_id, for_terminal(rating.image_id)
        item = db.execute("SELECT * FROM items WHERE id = ?", (rating.image_id,)).fetchone()
        found = (rating.prompt, rating.width, rating.height)
        if item is None or (item["prompt"], item["width"], item["height"]) != found:
            raise errors.UserError(f"{place}: the project has no image of this name, prompt and size")
        db.execute("INSERT OR IGNORE INTO people (name, is_manager) VALUES (?, FALSE)", (name,))
        person = db.execute("SELECT id FROM people WHERE name = ?", (name,)).fetchone()[0]
        known = db.execute(
            "SELECT 1 FROM answers WHERE item = ? AND person = ?", (item["number"], person)
        ).fetchone()
        if known:
            raise errors.UserError(f"{place}: {for_terminal(name)} has it already")
        others = assignment.other_places(db, item["number"], person, now)
        if item["gold"] is None and others >= self.config.raters:
            raise errors.UserError(
                f"{place}: {others} raters have answered or are at work, and `raters` in"
                f" {project.CONFIG} allows no more"
            )
        self._insert(db, item["number"], person, 0, False, now)
        row = self._rows(db, "answers.person = ? AND items.number = ?", person, item["number"])[0]
        self._write(db, row, "done", answer, seconds)
        self._fill(db, item["number"])

    def reassign(self, item_id: str, person_id: int | None = None) -> None:
        """Gives an item that was skipped back to the raters, or to one of them.

        Args:
          item_id: the item.
          person_id: who gets it next, and keeps it for a week; None: anyone.

        Raises:
          errors.UserError: there is no such item, it has all its answers, or the rater has answered it.
        """
        now = self._clock()
        with self._database.transaction() as db:
            item = db.execute("SELECT * FROM items WHERE id = ?", (item_id,)).fetchone()
            if item is None:
                raise errors.UserError(f"{for_terminal(item_id)}: the project has no such item")
            number = item["number"]
            db.execute(
                "UPDATE answers SET excluded = 'reassigned'"
                " WHERE item = ? AND state IN ('skipped', 'broken')",
                (number,),
            )
            db.execute("UPDATE items SET state = 'open' WHERE number = ?", (number,))
            self._fill(db, number)
            if person_id is not None:
                self._give(db, item, person_id, now)

    def _give(self, db: sqlite3.Connection, item: sqlite3.Row, person_id: int, now: float) -> None:
        """Makes a draft of an item for a rater, or opens the one that they skipped."""
        if assignment.other_places(db, item["number"], person_id, now) >= self.config.raters:
            raise errors.UserError(
                f"{for_terminal(item['id'])} has all its answers, or raters are at work: exclude an answer"
                " first"
            )
        number, end = item["number"], now + _GIVEN_SECONDS
        mine = db.execute(
            "SELECT * FROM answers WHERE item = ? AND person = ? ORDER BY round DESC", (number, person_id)
        ).fetchone()
        if mine is None:
            self._insert(db, number, person_id, 0, False, now)
        elif mine["state"] == "done":
            raise errors.UserError(f"this rater has answered {for_terminal(item['id'])}: choose another one")
        db.execute(
            "UPDATE answers SET state = 'draft', excluded = NULL, expires = ? WHERE item = ? AND person = ?",
            (end, number, person_id),
        )

    def _fill(self, db: sqlite3.Connection, number: int) -> None:
        """Takes an item out of the open ones where it has all answers."""
        db.execute(
            f"UPDATE items SET state = 'full' WHERE number = ? AND state = 'open' AND gold IS NULL"
            f" AND {_DONE} >= ?",
            (number, self.config.raters),
        )

    def _reopen(self, db: sqlite3.Connection) -> None:
        """Opens full items that lack answers: one was excluded, or `raters` was raised."""
        db.execute(
            f"UPDATE items SET state = 'open' WHERE state = 'full' AND {_DONE} < ?", (self.config.raters,)
        )


def _dump(answer: forms.Answer) -> str:
    return json.dumps(answer, allow_nan=False)
