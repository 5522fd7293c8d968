"""The store of a project: who rates which item, and the answers.

A method that returns has its change on the disk; see `database`. A disk without room is an
sqlite3.OperationalError, and changes nothing.
"""

import pathlib
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator

from richhf_jax import errors, writing
from richhf_jax.annotate import answers as forms
from richhf_jax.annotate import assignment, database, project, records, settings
from richhf_jax.annotate.rater_work import RaterWork
from richhf_jax.annotate.records import Answer, Item
from richhf_jax.datasets import ratings
from richhf_jax.foreign_text import for_terminal
from richhf_jax.inputs.record import printable

# An item that the manager gives to a rater is kept for them for a week.
_GIVEN_SECONDS = 7 * 24 * 3600


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
                self._reopen(db)

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
                f" {settings.CONFIG} allows no more"
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
