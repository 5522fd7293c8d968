"""The store of a project: who rates which item, and the answers.

A method that returns has its change on the disk; see `database`. A disk without room is an
sqlite3.OperationalError, and changes nothing.
"""

import collections
import pathlib
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator

from richhf_jax import errors, writing
from richhf_jax.annotate import answers as forms
from richhf_jax.annotate import assignment, database, project, records, settings
from richhf_jax.annotate.rater_work import RaterWork
from richhf_jax.annotate.records import Answer, Item, Person
from richhf_jax.datasets import ratings
from richhf_jax.foreign_text import for_terminal
from richhf_jax.inputs.record import printable

# An item that the manager gives to a rater is kept for them for a week.
_GIVEN_SECONDS = 7 * 24 * 3600
_NO_PLACE = "has all its answers, or raters are at work on it: exclude an answer first"


class Store(RaterWork):
    """A project's database. All times are those of `clock`, in seconds since 1970."""

    def __init__(self, folder: str | pathlib.Path, clock: Callable[[], float] = time.time):
        """Opens a project.

        Raises:
          errors.UserError: the folder is no project, its settings are wrong, or a newer version made it.
        """
        place = pathlib.Path(folder)
        with database.explained_errors(place / project.DATABASE):
            super().__init__(place, clock)
            with self._database.transaction() as db:
                # `raters` may have been changed.
                self._reopen(db)
                self._end_first_answers(db)

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
        database.create(place / project.DATABASE, database.PROJECT)
        project.write_config(place, config)
        store = cls(place, clock)
        store.add_items(items)
        return store

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

    def end_first_answers(self) -> None:
        """Lets first answers count whose raters haven't come back, as at opening the project."""
        with self._database.transaction() as db:
            self._end_first_answers(db)

    def open_drafts(self) -> collections.Counter[int]:
        """Counts the drafts with a place, without those of the first round: rater's id -> number."""
        now = self._clock()
        with self._database.connection() as db:
            drafts = self._rows(db, "answers.state = 'draft' AND NOT is_calibration")
            return collections.Counter(row["person"] for row in drafts if self._has_place(db, row, now))

    def for_manager(self) -> list[str]:
        """Returns the ids of the items that two raters skipped or called broken."""
        with self._database.connection() as db:
            rows = db.execute("SELECT id FROM items WHERE state = 'manager' ORDER BY number")
            return [row[0] for row in rows]

    def exclude(self, answer_id: int, reason: str) -> str:
        """Makes an answer not count. It is kept, and its item gets another one.

        Returns:
          The item's id.

        Raises:
          KeyError: there is no such answer, or it is a draft.
        """
        with self._database.transaction() as db:
            row = self._ended(db, answer_id)
            db.execute("UPDATE answers SET excluded = ? WHERE id = ?", (printable(reason), answer_id))
            self._reopen(db)
            return row["item_id"]

    def include(self, answer_id: int) -> str:
        """Makes an answer count that was excluded.

        Returns:
          The item's id.

        Raises:
          KeyError: as `exclude`.
          errors.UserError: others have taken its place meanwhile, or it was skipped: who skipped an item may
            have it given back, see `reassign`.
        """
        with self._database.transaction() as db:
            row = self._ended(db, answer_id)
            name = for_terminal(row["item_id"])
            if row["state"] != "done":
                raise errors.UserError(f"{name} was skipped: there is no answer that could count")
            others = assignment.other_places(db, row["number"], row["person"], self._clock())
            if row["gold"] is None and others >= self.config.raters:
                raise errors.UserError(f"{name} {_NO_PLACE}")
            db.execute("UPDATE answers SET excluded = NULL WHERE id = ?", (answer_id,))
            self._fill(db, row["number"])
            return row["item_id"]

    def _ended(self, db: sqlite3.Connection, answer_id: int) -> sqlite3.Row:
        """Returns an answer that is no draft, beside its item."""
        rows = self._rows(db, "answers.id = ? AND answers.state != 'draft'", answer_id)
        if not rows:
            raise KeyError(answer_id)
        return rows[0]

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
        person, is_manager = db.execute(
            "SELECT id, is_manager FROM people WHERE name = ?", (name,)
        ).fetchone()
        if is_manager:
            raise errors.UserError(
                f"{place}: its rater has the manager's name, {for_terminal(name)}: give it another rater_id"
            )
        known = db.execute(
            "SELECT 1 FROM answers WHERE item = ? AND person = ?", (item["number"], person)
        ).fetchone()
        if known:
            raise errors.UserError(f"{place}: {for_terminal(name)} has it already")
        others = assignment.other_places(db, item["number"], person, now)
        if item["gold"] is None and others >= self.config.raters:
            raise errors.UserError(
                f"{place}: {others} raters have answered or are at work, and `raters` in"
                f" {settings.CONFIG} allows no more"
            )
        self._insert(db, item["number"], person, 0, False, now)
        row = self._rows(db, "answers.person = ? AND items.number = ?", person, item["number"])[0]
        self._write(db, row, "done", answer, seconds)
        if rating.suggested:  # By which suggestion isn't known here.
            db.execute("UPDATE answers SET shown = '{}' WHERE id = ?", (row["id"],))
        self._fill(db, item["number"])

    def reassign(self, item_id: str, person_id: int | None = None) -> str:
        """Gives an item to the raters, or to one of them. Earlier skips no longer count.

        Args:
          item_id: the item.
          person_id: who gets it next, and keeps it for a week; None: anyone.

        Returns:
          The item's id.

        Raises:
          errors.UserError: there is no such item, or the rater can't get it; the message says why.
        """
        now = self._clock()
        with self._database.transaction() as db:
            item = self._known(db, item_id)
            number = item["number"]
            if person_id is not None and (obstacle := self._obstacle(db, item, person_id, now)):
                raise errors.UserError(obstacle)
            db.execute(
                "UPDATE answers SET excluded = 'reassigned'"
                " WHERE item = ? AND state IN ('skipped', 'broken') AND excluded IS NULL",
                (number,),
            )
            self._reopen(db)
            if person_id is not None:
                self._give(db, number, person_id, now)
            return item_id

    def candidates(self, item_id: str) -> list[Person]:
        """Returns the raters whom `reassign` can give an item to.

        Raises:
          errors.UserError: there is no such item.
        """
        now = self._clock()
        with self._database.connection() as db:
            item = self._known(db, item_id)
            rows = db.execute("SELECT * FROM people ORDER BY id").fetchall()
            return [records.person(row) for row in rows if not self._obstacle(db, item, row["id"], now)]

    def _known(self, db: sqlite3.Connection, item_id: str) -> sqlite3.Row:
        item = db.execute("SELECT * FROM items WHERE id = ?", (item_id,)).fetchone()
        if item is None:
            raise errors.UserError(f"{for_terminal(item_id)}: the project has no such item")
        return item

    def _obstacle(self, db: sqlite3.Connection, item: sqlite3.Row, person_id: int, now: float) -> str | None:
        """Returns why an item can't be given to a person; None where it can."""
        name, number = for_terminal(item["id"]), item["number"]
        if item["gold"] is not None:
            return f"{name} is a gold image, which comes to each rater by itself: give it back to anyone"
        person = db.execute("SELECT * FROM people WHERE id = ?", (person_id,)).fetchone()
        if person is None or person["is_manager"] or not person["active"]:
            return "this person is no active rater: choose another one"
        if not person["passed"] and assignment.calibration_numbers(db, self.config):
            return "this rater is still in the practice: choose another one"
        ended = db.execute(
            "SELECT 1 FROM answers WHERE item = ? AND person = ? AND state = 'done'", (number, person_id)
        ).fetchone()
        if ended:
            return f"this rater has answered {name}: choose another one"
        if assignment.other_places(db, number, person_id, now) >= self.config.raters:
            return f"{name} {_NO_PLACE}"
        return None

    def _give(self, db: sqlite3.Connection, number: int, person_id: int, now: float) -> None:
        """Makes a draft of an item for a rater, or opens the one that they have or skipped."""
        draft = (number, person_id)
        if not db.execute("SELECT 1 FROM answers WHERE item = ? AND person = ?", draft).fetchone():
            self._insert(db, number, person_id, 0, False, now)
        db.execute(
            "UPDATE answers SET state = 'draft', reason = '', excluded = NULL, expires = ?"
            " WHERE item = ? AND person = ?",
            (now + _GIVEN_SECONDS, *draft),
        )
