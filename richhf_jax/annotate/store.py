"""The database of a project: people, items and answers, in SQLite.

A method that returns has its change on the disk (WAL with synchronous=FULL): neither SIGKILL nor a power cut takes
it back. Any threads and processes may use one project at once; a write is one transaction. A disk without room is
an sqlite3.OperationalError, and changes nothing.
"""

import collections
import contextlib
import dataclasses
import hashlib
import hmac
import json
import math
import pathlib
import secrets
import sqlite3
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from richhf_jax import errors, writing
from richhf_jax.annotate import answers as forms
from richhf_jax.annotate import assignment, project
from richhf_jax.foreign_text import for_terminal
from richhf_jax.inputs.record import printable

SCHEMA = 1
# Says that a database is ours ("RHFa"); `file` shows it.
_APPLICATION = 0x52484661
# Raters who skip an item, or call it broken, until it goes to the manager.
_SKIPS = 2
_LONGEST_WAIT_SECONDS = 30
_TABLES = """
CREATE TABLE people (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, secret BLOB UNIQUE, is_manager INTEGER NOT NULL,
    active INTEGER NOT NULL DEFAULT 1, passed INTEGER NOT NULL DEFAULT 0, round INTEGER NOT NULL DEFAULT 0);
CREATE TABLE items (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, prompt TEXT NOT NULL, file TEXT NOT NULL,
    width INTEGER NOT NULL, height INTEGER NOT NULL, gold TEXT, priority INTEGER NOT NULL,
    state TEXT NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'full', 'manager')));
CREATE INDEX open_items ON items (priority DESC, number) WHERE state = 'open' AND gold IS NULL;
CREATE INDEX gold_items ON items (number) WHERE gold IS NOT NULL;
CREATE TABLE answers (
    id INTEGER PRIMARY KEY, item INTEGER NOT NULL REFERENCES items, person INTEGER NOT NULL REFERENCES people,
    round INTEGER NOT NULL DEFAULT 0, is_calibration INTEGER NOT NULL DEFAULT 0,
    state TEXT NOT NULL CHECK (state IN ('draft', 'done', 'skipped', 'broken')),
    answer TEXT NOT NULL, revision INTEGER NOT NULL DEFAULT 0, seconds REAL NOT NULL DEFAULT 0,
    started REAL NOT NULL, changed REAL NOT NULL, expires REAL NOT NULL,
    score REAL, reason TEXT NOT NULL DEFAULT '', excluded TEXT, UNIQUE (item, person, round));
CREATE INDEX answers_of_person ON answers (person, state);
"""


class NotYours(Exception):
    """The item was never given to this rater, or is no longer open for them."""


class Closed(NotYours):
    """The rater's answer is finished or skipped, or its lease expired and others took all places."""


class Conflict(Exception):
    """The answer has another revision than the caller knows: another tab has changed it."""

    def __init__(self, revision: int, answer: forms.Answer):
        super().__init__(f"the answer has revision {revision}")
        self.revision, self.answer = revision, answer


class Incomplete(Exception):
    """Parts of the answer are missing; `missing` names them."""

    def __init__(self, missing: list[str]):
        super().__init__(f"missing: {', '.join(missing)}")
        self.missing = missing


@dataclasses.dataclass(frozen=True)
class Item:
    """An image to rate.

    Attributes:
      id: the image's name for the user, as in raw ratings.
      prompt: the text that it was made from.
      file: the name of its file in the project's folder of images.
      width, height: pixels.
      gold: the right answer, see `answers`; None where none is known.
      priority: items of a higher one come first.
    """

    id: str
    prompt: str
    file: str
    width: int
    height: int
    gold: forms.Answer | None = None
    priority: int = 0


@dataclasses.dataclass(frozen=True)
class Person:
    """A rater or a manager. `passed`: whether a rater has passed the first round."""

    id: int
    name: str
    is_manager: bool
    active: bool
    passed: bool


@dataclasses.dataclass(frozen=True)
class Work:
    """An item in a rater's hands. `state` is "draft", "done", "skipped" or "broken"; `seconds` is the time spent."""

    item: Item
    answer: forms.Answer
    revision: int
    state: str
    is_calibration: bool
    seconds: float


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a rater is: items done and still open for them, seconds spent, items of the first round left."""

    done: int
    total_open: int
    seconds: float
    calibration_left: int


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer as the manager sees it.

    Attributes:
      id: its number.
      item: the image.
      person: who gave it.
      answer: see `answers`.
      state: "draft", "done", "skipped" or "broken".
      revision: number of changes.
      seconds: time spent.
      started, changed: seconds since 1970.
      is_calibration: whether it belongs to the first round.
      score: `answers.gold_score`; None where the item isn't gold.
      reason: why the item was skipped.
      excluded: why the answer doesn't count; None where it counts.
    """

    id: int
    item: Item
    person: Person
    answer: forms.Answer
    state: str
    revision: int
    seconds: float
    started: float
    changed: float
    is_calibration: bool
    score: float | None
    reason: str
    excluded: str | None


class Store:
    """A project's database. All times are those of `clock`, in seconds since 1970."""

    def __init__(self, folder: str | pathlib.Path, clock: Callable[[], float] = time.time):
        """Opens a project.

        Raises:
          errors.UserError: the folder is no project, its settings are wrong, or a newer version made it.
        """
        self.folder = pathlib.Path(folder)
        self.config = project.read_config(self.folder)
        self._clock = clock
        self._path = self.folder / project.DATABASE
        self._connections: collections.deque[sqlite3.Connection] = collections.deque()
        # Threads wait here in turn. SQLite's own waiting is for other processes, and isn't fair.
        self._lock = threading.Lock()
        with self._explained(), self._connection() as db:
            application, schema = (
                db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
            )
            if application != _APPLICATION:
                raise errors.UserError(f"{self._path} is no project's database: restore it from a backup")
            if schema > SCHEMA:
                raise errors.UserError(
                    f"{self._path} was made by a newer richhf_jax (schema {schema}, here {SCHEMA}):"
                    " update richhf_jax"
                )
        with self._explained(), self._transaction() as db:
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
        path = place / project.DATABASE
        if path.exists():
            raise errors.UserError(f"{path} is there already: name a new folder")
        writing.make_folder(place)
        project.write_config(place, config)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.executescript(
                f"PRAGMA synchronous = FULL; BEGIN; {_TABLES}"
                f"PRAGMA application_id = {_APPLICATION}; PRAGMA user_version = {SCHEMA}; COMMIT;"
            )
        store = cls(place, clock)
        store.add_items(items)
        return store

    def close(self) -> None:
        """Closes the connections that no thread uses."""
        while self._connections:
            self._connections.pop().close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise errors.UserError(
                f"{self._path}: {error}. Give the right to write the folder, or restore the file from a backup"
            ) from error

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """Yields a connection that no other thread uses meanwhile."""
        try:
            db = self._connections.pop()
        except IndexError:
            # Never makes a file: a project that was deleted stays deleted.
            address = f"file:{urllib.parse.quote(str(self._path.absolute()))}?mode=rw"
            db = sqlite3.connect(
                address, _LONGEST_WAIT_SECONDS, isolation_level=None, check_same_thread=False, uri=True
            )
            db.row_factory = sqlite3.Row
            db.executescript("PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;")
        try:
            yield db
        finally:
            self._connections.append(db)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Yields a connection whose changes are on the disk at the end of the block; after an error, none is."""
        with self._lock, self._connection() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                db.rollback()
                raise

    # Items and people.

    def add_items(self, items: Iterable[Item]) -> int:
        """Adds items, all or none. Returns how many are new.

        An item that is there with the same prompt and file only gets the new priority and gold answer.

        Raises:
          errors.UserError: an item of this id is there with another prompt or file, or a gold answer comes for
            an item that has been rated.
        """
        with self._transaction() as db:
            return sum(self._add_item(db, item) for item in items)

    def _add_item(self, db: sqlite3.Connection, item: Item) -> bool:
        gold = None if item.gold is None else json.dumps(item.gold)
        known = db.execute("SELECT * FROM items WHERE id = ?", (item.id,)).fetchone()
        if known is None:
            db.execute(
                "INSERT INTO items (id, prompt, file, width, height, gold, priority) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (item.id, item.prompt, item.file, item.width, item.height, gold, item.priority),
            )
            return True
        if (known["prompt"], known["file"]) != (item.prompt, item.file):
            raise errors.UserError(
                f"{for_terminal(item.id)}: the project has another image or prompt of this id: give it another id"
            )
        is_rated = db.execute("SELECT 1 FROM answers WHERE item = ? LIMIT 1", (known["number"],)).fetchone()
        if gold is not None and known["gold"] is None and is_rated:
            raise errors.UserError(
                f"{for_terminal(item.id)}: raters have it already, so it can't become a gold item: leave it out"
            )
        db.execute(
            "UPDATE items SET gold = coalesce(?, gold), priority = ? WHERE number = ?",
            (gold, item.priority, known["number"]),
        )
        return False

    def items(self) -> Iterator[Item]:
        """Yields all items, in the order in which they were added."""
        with self._connection() as db:
            yield from map(_item, db.execute("SELECT * FROM items ORDER BY number"))

    def image_path(self, item: Item) -> pathlib.Path:
        """Returns the path of an item's image."""
        return self.folder / project.IMAGES / item.file

    def add_rater(self, name: str) -> str:
        """Adds a rater. Returns the secret of their link, which is kept as a hash alone.

        Raises:
          errors.UserError: the name is empty, or taken.
        """
        return self._add_person(name, is_manager=False)

    def make_manager(self) -> str:
        """Makes the manager's link. Returns its secret; an earlier one is void."""
        with self._connection() as db:
            known = db.execute("SELECT name FROM people WHERE is_manager").fetchone()
        return self.renew(known[0]) if known else self._add_person("manager", is_manager=True)

    def _add_person(self, name: str, is_manager: bool) -> str:
        name = printable(name).strip()
        if not name:
            raise errors.UserError("a rater's name is empty: give one")
        secret = secrets.token_urlsafe(16)
        try:
            with self._transaction() as db:
                db.execute(
                    "INSERT INTO people (name, secret, is_manager) VALUES (?, ?, ?)",
                    (name, _hash(secret), is_manager),
                )
        except sqlite3.IntegrityError:
            raise errors.UserError(
                f"there is a person named {for_terminal(name)} already: give another name, or a new link with"
                " `raters renew`"
            ) from None
        return secret

    def renew(self, name: str) -> str:
        """Gives a person a new link and makes them active. Returns its secret; the earlier one is void.

        Raises:
          errors.UserError: there is no such person.
        """
        secret = secrets.token_urlsafe(16)
        with self._transaction() as db:
            changed = db.execute(
                "UPDATE people SET secret = ?, active = 1 WHERE name = ?", (_hash(secret), name.strip())
            ).rowcount
            if not changed:
                raise errors.UserError(f"there is no rater named {for_terminal(name)}: see `status`")
        return secret

    def person(self, secret: str) -> Person | None:
        """Returns the person of a link's secret; None where it is wrong."""
        digest = _hash(secret)
        with self._connection() as db:
            row = db.execute("SELECT * FROM people WHERE secret = ?", (digest,)).fetchone()
        return _person(row) if row and hmac.compare_digest(row["secret"], digest) else None

    def people(self) -> list[Person]:
        """Returns all raters and the manager, in the order in which they were added."""
        with self._connection() as db:
            return [_person(row) for row in db.execute("SELECT * FROM people ORDER BY id")]

    def deactivate(self, person_id: int) -> None:
        """Makes a person's link void and frees the items that they have open. Their answers stay."""
        with self._transaction() as db:
            db.execute("UPDATE people SET active = 0 WHERE id = ?", (person_id,))
            db.execute("UPDATE answers SET expires = 0 WHERE person = ? AND state = 'draft'", (person_id,))

    # A rater's work.

    def next_item(self, person: Person) -> Work | None:
        """Gives a rater their open draft, or else the next item. Renews its lease.

        The first round comes first. Returns None where nothing is left for this rater now.
        """
        now = self._clock()
        with self._transaction() as db:
            for row in self._rows(db, "answers.person = ? AND answers.state = 'draft'", person.id):
                if self._has_place(db, row, now):
                    self._lease(db, row["id"], now)
                    return _work(row)
            me = db.execute("SELECT * FROM people WHERE id = ?", (person.id,)).fetchone()
            left = [] if me["passed"] else self._calibration_left(db, me)
            number = left[0] if left else assignment.next_number(db, self.config, person.id, now)
            if number is None:
                return None
            prompt = db.execute("SELECT prompt FROM items WHERE number = ?", (number,)).fetchone()[0]
            db.execute(
                "INSERT INTO answers (item, person, round, is_calibration, state, answer, started, changed, expires)"
                " VALUES (?, ?, ?, ?, 'draft', ?, ?, ?, 0)",
                (
                    number,
                    person.id,
                    me["round"] if left else 0,
                    bool(left),
                    _dump(forms.empty(prompt)),
                    now,
                    now,
                ),
            )
            row = self._mine(db, person, number)
            self._lease(db, row["id"], now)
            return _work(row)

    def work(self, person: Person, item_id: str) -> Work:
        """Returns an item that was given to a rater, with their answer.

        Raises:
          NotYours: it was never given to them.
        """
        with self._connection() as db:
            return _work(self._mine(db, person, item_id))

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
        with self._transaction() as db:
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
        with self._transaction() as db:
            row = self._mine(db, person, item_id)
            # The reply may have been lost, and the page sends the same again.
            if row["state"] == "done" and json.loads(row["answer"]) == answer:
                return self._feedback(db, row, row["score"])
            row = self._open(db, person, item_id, revision)
            if missing := forms.missing(forms.checked(answer, row["prompt"], _size(row)), self.config):
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
        """Ends a rater's work on an item without an answer. The second rater who does sends it to the manager.

        Raises:
          NotYours, Conflict: as `save`.
        """
        with self._transaction() as db:
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
        with self._connection() as db:
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
        return db.execute(f"{_BESIDE_ITEMS} WHERE {condition} ORDER BY answers.id DESC", values).fetchall()

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
                _dump(forms.checked(answer, row["prompt"], _size(row))),
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

    def _feedback(self, db: sqlite3.Connection, row: sqlite3.Row, score: float) -> dict[str, Any] | None:
        if not row["is_calibration"]:
            return None
        me = db.execute("SELECT * FROM people WHERE id = ?", (row["person"],)).fetchone()
        is_end = me["passed"] or me["round"] != row["round"]
        left = 0 if is_end else len(self._calibration_left(db, me))
        passed = bool(me["passed"]) if is_end else None
        return {"score": score, "answer": json.loads(row["gold"]), "left": left, "passed": passed}

    # The manager's part.

    def answers(self, finished: bool = True) -> Iterator[Answer]:
        """Yields answers in the order in which they were begun; with `finished`, only those of state "done"."""
        with self._connection() as db:
            people = {row["id"]: _person(row) for row in db.execute("SELECT * FROM people")}
            condition = " WHERE answers.state = 'done'" if finished else ""
            for row in db.execute(f"{_BESIDE_ITEMS}{condition} ORDER BY answers.id"):
                yield _answer(row, people[row["person"]])

    def exclude(self, answer_id: int, reason: str) -> None:
        """Makes an answer not count. It is kept, and its item gets another one.

        Raises:
          KeyError: there is no such answer.
        """
        with self._transaction() as db:
            changed = db.execute(
                "UPDATE answers SET excluded = ? WHERE id = ?", (printable(reason), answer_id)
            ).rowcount
            if not changed:
                raise KeyError(answer_id)
            self._reopen(db)

    def backup(self, path: str | pathlib.Path) -> None:
        """Copies the database to a file, also while raters work.

        Raises:
          OSError: it can't be written.
        """
        with (
            writing.atomic(path) as new,
            self._connection() as db,
            contextlib.closing(sqlite3.connect(new)) as copy,
        ):
            db.backup(copy)

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


# Answers' columns come first: of two with the same name, a row gives the first.
_BESIDE_ITEMS = (
    "SELECT answers.*, items.id AS item_id, items.* FROM answers JOIN items ON items.number = answers.item"
)
_DONE = (
    "(SELECT count(*) FROM answers WHERE item = items.number AND answers.state = 'done' AND excluded IS NULL)"
)


def _hash(secret: str) -> bytes:
    return hashlib.sha256(printable(secret).encode()).digest()


def _dump(answer: forms.Answer) -> str:
    return json.dumps(answer, allow_nan=False)


def _size(row: sqlite3.Row) -> tuple[int, int]:
    return row["width"], row["height"]


def _person(row: sqlite3.Row) -> Person:
    return Person(row["id"], row["name"], *(bool(row[name]) for name in ("is_manager", "active", "passed")))


def _item(row: sqlite3.Row, name: str = "id") -> Item:
    return Item(
        row[name],
        row["prompt"],
        row["file"],
        *_size(row),
        None if row["gold"] is None else json.loads(row["gold"]),
        row["priority"],
    )


def _work(row: sqlite3.Row) -> Work:
    return Work(
        _item(row, "item_id"),
        json.loads(row["answer"]),
        row["revision"],
        row["state"],
        bool(row["is_calibration"]),
        row["seconds"],
    )


def _answer(row: sqlite3.Row, person: Person) -> Answer:
    same = ("state", "revision", "seconds", "started", "changed", "score", "reason", "excluded")
    return Answer(
        id=row["id"],
        item=_item(row, "item_id"),
        person=person,
        answer=json.loads(row["answer"]),
        is_calibration=bool(row["is_calibration"]),
        **{name: row[name] for name in same},
    )
