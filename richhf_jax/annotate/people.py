"""The people of a project or a survey, and the secrets of their links."""

import hashlib
import hmac
import pathlib
import secrets
import sqlite3

from richhf_jax import errors
from richhf_jax.annotate import records
from richhf_jax.annotate.database import Database
from richhf_jax.annotate.records import Person
from richhf_jax.foreign_text import for_terminal
from richhf_jax.inputs.record import printable

# Characters of a person's name.
_MAX_NAME = 100


class People:
    """The part of a store that knows its people. A secret has 128 bits, and is kept as a hash alone."""

    folder: pathlib.Path

    def __init__(self, database: Database):
        self._database = database

    def close(self) -> None:
        """Closes the database."""
        self._database.close()

    def site_id(self) -> str:
        """Returns the database's random name, which no other one has."""
        with self._database.connection() as db:
            return db.execute("SELECT id FROM site").fetchone()[0]

    def backup(self, path: pathlib.Path) -> None:
        """Copies the database to a file; see `database.Database.backup`."""
        self._database.backup(path)

    def add_rater(self, name: str) -> str:
        """Adds a rater. Returns the secret of their link, which is kept as a hash alone.

        Raises:
          errors.UserError: the name is empty, or taken.
        """
        return self._add_person(name, is_manager=False)

    def make_manager(self) -> str:
        """Makes the manager's link. Returns its secret; an earlier one is void."""
        with self._database.connection() as db:
            known = db.execute("SELECT name FROM people WHERE is_manager").fetchone()
        return self._renew(known[0]) if known else self._add_person("manager", is_manager=True)

    def _add_person(self, name: str, is_manager: bool) -> str:
        name = printable(name).strip()
        if not name:
            raise errors.UserError("a rater's name is empty: give one")
        if len(name) > _MAX_NAME:
            raise errors.UserError(
                f"{for_terminal(name[:20])}…: a name must have at most {_MAX_NAME} characters"
            )
        if any(person.name.casefold() == name.casefold() for person in self.people()):
            raise errors.UserError(_taken(name))
        secret = secrets.token_urlsafe(16)
        try:
            with self._database.transaction() as db:
                db.execute(
                    "INSERT INTO people (name, secret, is_manager) VALUES (?, ?, ?)",
                    (name, _hash(secret), is_manager),
                )
        except sqlite3.IntegrityError:
            raise errors.UserError(_taken(name)) from None
        return secret

    def renew(self, name: str) -> str:
        """Gives a rater a new link and makes them active. Returns its secret; the earlier one is void.

        Raises:
          errors.UserError: there is no such rater.
        """
        return self._renew(self.rater(name).name)

    def _renew(self, name: str) -> str:
        secret = secrets.token_urlsafe(16)
        with self._database.transaction() as db:
            db.execute("UPDATE people SET secret = ?, active = 1 WHERE name = ?", (_hash(secret), name))
        return secret

    def person(self, secret: str) -> Person | None:
        """Returns the person of a link's secret; None where it is wrong."""
        digest = _hash(secret)
        with self._database.connection() as db:
            row = db.execute("SELECT * FROM people WHERE secret = ?", (digest,)).fetchone()
        return records.person(row) if row and hmac.compare_digest(row["secret"], digest) else None

    def rater(self, name: str) -> Person:
        """Returns the rater of a name.

        Raises:
          errors.UserError: there is none; the manager is no rater.
        """
        for person in self.people():
            if person.name == name.strip() and not person.is_manager:
                return person
        raise errors.UserError(f"there is no rater named {for_terminal(name)}: see `status`")

    def people(self) -> list[Person]:
        """Returns all raters and the manager, in the order in which they were added."""
        with self._database.connection() as db:
            return [records.person(row) for row in db.execute("SELECT * FROM people ORDER BY id")]

    def deactivate(self, person_id: int) -> None:
        """Makes a rater's link void and frees the items that they have open. Their answers stay."""
        with self._database.transaction() as db:
            db.execute("UPDATE people SET active = 0 WHERE id = ? AND NOT is_manager", (person_id,))
            db.execute("UPDATE answers SET expires = 0 WHERE person = ? AND state = 'draft'", (person_id,))


def _taken(name: str) -> str:
    return (
        f"there is a person named {for_terminal(name)} already: give another name, or to a rater a new link"
        " with `raters renew`"
    )


def _hash(secret: str) -> bytes:
    return hashlib.sha256(printable(secret).encode()).digest()
