"""The images of a project, in the database."""

import json
import pathlib
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from richhf_jax import errors
from richhf_jax.annotate import database, project, records
from richhf_jax.annotate.people import People
from richhf_jax.annotate.records import Item
from richhf_jax.foreign_text import for_terminal


class Items(People):
    """The part of a store that knows its images and settings."""

    def __init__(self, folder: pathlib.Path, clock: Callable[[], float] = time.time):
        self.folder = folder
        self.config = project.read_config(folder)
        self._clock = clock
        super().__init__(database.Database(folder / project.DATABASE, database.PROJECT))

    def add_items(self, items: Iterable[Item]) -> int:
        """Adds items, all or none. Returns how many are new.

        One that is there with the same prompt and file isn't new; it gets the gold answer if it has none, and
        the suggestion in place of its own.

        Raises:
          errors.UserError: an item of this id is there with another prompt or file, or a gold answer comes
            for an item that has been rated.
        """
        with self._database.transaction() as db:
            return sum(self._add_item(db, item) for item in items)

    def _add_item(self, db: sqlite3.Connection, item: Item) -> bool:
        gold, suggestion = (
            None if part is None else json.dumps(part) for part in (item.gold, item.suggestion)
        )
        known = db.execute("SELECT * FROM items WHERE id = ?", (item.id,)).fetchone()
        if known is None:
            db.execute(
                "INSERT INTO items (id, prompt, file, width, height, gold, priority, suggestion)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (item.id, item.prompt, item.file, item.width, item.height, gold, item.priority, suggestion),
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
        db.execute(
            "UPDATE items SET gold = coalesce(gold, ?), suggestion = coalesce(?, suggestion)"
            " WHERE number = ?",
            (gold, suggestion, known["number"]),
        )
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
