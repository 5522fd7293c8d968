"""The SQLite file of a project or a survey: its tables, connections and transactions.

A transaction that has ended is on the disk (WAL with synchronous=FULL): neither SIGKILL nor a power cut takes
it back. Any threads and processes may use one file at once.
"""

import collections
import contextlib
import dataclasses
import pathlib
import sqlite3
import threading
import urllib.parse
from collections.abc import Iterator

from richhf_jax import errors, writing

# Longest wait for another process that writes.
_PATIENCE_SECONDS = 30
PEOPLE = """
CREATE TABLE people (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, secret BLOB UNIQUE, is_manager INTEGER NOT NULL,
    active INTEGER NOT NULL DEFAULT 1, passed INTEGER NOT NULL DEFAULT 0, round INTEGER NOT NULL DEFAULT 0);
"""
# A random name of the database: what a browser keeps of one site never gets into another at the same address.
SITE = (
    "CREATE TABLE site (id TEXT NOT NULL)",
    "INSERT INTO site VALUES (lower(hex(randomblob(8))))",
)
_TABLES = """
CREATE TABLE items (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, prompt TEXT NOT NULL, file TEXT NOT NULL,
    width INTEGER NOT NULL, height INTEGER NOT NULL, gold TEXT, priority INTEGER NOT NULL,
    state TEXT NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'full', 'manager')));
CREATE INDEX open_items ON items (priority DESC, number) WHERE state = 'open' AND gold IS NULL;
CREATE INDEX gold_items ON items (number) WHERE gold IS NOT NULL;
CREATE TABLE answers (
    id INTEGER PRIMARY KEY, item INTEGER NOT NULL REFERENCES items,
    person INTEGER NOT NULL REFERENCES people, round INTEGER NOT NULL DEFAULT 0,
    is_calibration INTEGER NOT NULL DEFAULT 0,
    state TEXT NOT NULL CHECK (state IN ('draft', 'done', 'skipped', 'broken')),
    answer TEXT NOT NULL, revision INTEGER NOT NULL DEFAULT 0, seconds REAL NOT NULL DEFAULT 0,
    started REAL NOT NULL, changed REAL NOT NULL, expires REAL NOT NULL,
    score REAL, reason TEXT NOT NULL DEFAULT '', excluded TEXT, UNIQUE (item, person, round));
CREATE INDEX answers_of_person ON answers (person, state);
"""
# What each version from 2 on adds.
_ADDITIONS = (
    # A model's suggestion; the rater's answer before they saw one, and the one that they saw.
    (
        "ALTER TABLE items ADD COLUMN suggestion TEXT",
        "ALTER TABLE answers ADD COLUMN first TEXT",
        "ALTER TABLE answers ADD COLUMN shown TEXT",
    ),
    # All that is counted of a rater's answers, at each next image, is in the index.
    (
        "DROP INDEX answers_of_person",
        "CREATE INDEX answers_of_person ON answers (person, state, is_calibration, seconds, item)",
    ),
    SITE,
)


@dataclasses.dataclass(frozen=True)
class Schema:
    """What a kind of database holds.

    Attributes:
      application: the number that says in the file which kind it is.
      tables: the statements that make the tables of version 1.
      additions: statements that each later version adds to the one before; a database of an older version
        gets them when it is opened.
    """

    application: int
    tables: str
    additions: tuple[tuple[str, ...], ...] = ()

    @property
    def version(self) -> int:
        """The version of the tables."""
        return 1 + len(self.additions)


# "RHFa" in ASCII.
PROJECT = Schema(0x52484661, PEOPLE + _TABLES, _ADDITIONS)


def create(path: pathlib.Path, schema: Schema) -> None:
    """Makes an empty database.

    Raises:
      errors.UserError: the file is there already.
      sqlite3.Error: it can't be written.
    """
    if path.exists():
        raise errors.UserError(f"{path} is there already: name a new folder")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        additions = "".join(f"{statement};" for some in schema.additions for statement in some)
        db.executescript(
            f"PRAGMA synchronous = FULL; BEGIN; {schema.tables}{additions}"
            f"PRAGMA application_id = {schema.application}; PRAGMA user_version = {schema.version}; COMMIT;"
        )


@contextlib.contextmanager
def explained_errors(path: pathlib.Path) -> Iterator[None]:
    """Turns errors of a database into a UserError that says what to do."""
    try:
        yield
    except sqlite3.Error as error:
        fix = "Give the right to write the folder, or restore the file from a backup"
        if "full" in str(error):
            fix = "Make room on the disk"
        elif "locked" in str(error):
            fix = "Another program holds it: try again"
        elif isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
            fix = "Restore the file from a backup"
        raise errors.UserError(f"{path}: {error}. {fix}") from error


class Database:
    """The open file, with a connection for each thread that is at work."""

    def __init__(self, path: pathlib.Path, schema: Schema):
        """Opens a file that `create` made. One of an older version is brought to this one.

        Raises:
          errors.UserError: it is another file, or a newer version made it.
          sqlite3.Error: it can't be read.
        """
        self._path = path
        self._idle: collections.deque[sqlite3.Connection] = collections.deque()
        # Threads wait here in turn. SQLite's own waiting is for other processes, and isn't fair.
        self._lock = threading.Lock()
        with self.connection() as db:
            application, version = (_pragma(db, name) for name in ("application_id", "user_version"))
        if application != schema.application:
            self.close()
            raise errors.UserError(f"{path} is another database: restore this one from a backup")
        if version > schema.version:
            self.close()
            raise errors.UserError(
                f"{path} was made by a newer richhf_jax (schema {version}, here {schema.version}):"
                " update richhf_jax"
            )
        if version < schema.version:
            self._upgrade(schema)

    def _upgrade(self, schema: Schema) -> None:
        with self.transaction() as db:
            # Read again: another process may have been first.
            for statements in schema.additions[_pragma(db, "user_version") - 1 :]:
                for statement in statements:
                    db.execute(statement)
            db.execute(f"PRAGMA user_version = {schema.version}")

    @contextlib.contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """Yields a connection to read with, that no other thread uses meanwhile."""
        try:
            db = self._idle.pop()
        except IndexError:
            # mode=rw never makes a file: a project that was deleted stays deleted.
            address = f"file:{urllib.parse.quote(str(self._path.absolute()))}?mode=rw"
            db = sqlite3.connect(
                address,
                timeout=_PATIENCE_SECONDS,
                isolation_level=None,
                check_same_thread=False,
                uri=True,
            )
            db.row_factory = sqlite3.Row
            try:
                db.executescript("PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;")
            except sqlite3.Error:
                db.close()
                raise
        try:
            yield db
        finally:
            self._idle.append(db)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Yields a connection to write with.

        At the end of the block all its changes are on the disk; after an error there are none.
        """
        with self._lock, self.connection() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                db.rollback()
                raise

    def backup(self, path: pathlib.Path) -> None:
        """Copies the database to a file, as it is at one moment, also while others write.

        Raises:
          OSError, sqlite3.Error: it can't be written.
        """
        with (
            writing.atomic(path) as new,
            self.connection() as db,
            contextlib.closing(sqlite3.connect(new)) as copy,
        ):
            db.backup(copy)

    def close(self) -> None:
        """Closes the connections that no thread uses."""
        while self._idle:
            self._idle.pop().close()


def _pragma(db: sqlite3.Connection, name: str) -> int:
    return db.execute(f"PRAGMA {name}").fetchone()[0]
