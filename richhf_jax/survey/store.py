"""The store of a survey: who answers on which pair of images, and the answers.

A pair is two generators' images of one prompt, and gets exactly `raters` answers. A finished answer takes a
place for good, a draft takes one until its lease expires. Each rater has an order and sides of their own,
which follow from the seed. Checks of attention are answers on a pair, too, but take no place.

A method that returns has its change on the disk; see `annotate.database`.
"""

import dataclasses
import itertools
import math
import pathlib
import random
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from richhf_jax import writing
from richhf_jax.annotate import database
from richhf_jax.annotate.people import People
from richhf_jax.annotate.records import Closed, Conflict, NotYours, Person
from richhf_jax.inputs.record import printable
from richhf_jax.survey import config as settings
from richhf_jax.survey.answers import ANSWERS, CHECKS, IDENTICAL, Answer, AnswerError

# A pair comes again, as a check, no sooner than after this many answers of the rater.
CHECK_DISTANCE = 5
_TABLES = """
CREATE TABLE prompts (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, prompt TEXT NOT NULL);
CREATE TABLE images (
    prompt INTEGER NOT NULL REFERENCES prompts, generator TEXT NOT NULL, file TEXT NOT NULL,
    PRIMARY KEY (prompt, generator));
CREATE TABLE pairs (
    number INTEGER PRIMARY KEY, prompt INTEGER NOT NULL REFERENCES prompts, first TEXT NOT NULL,
    second TEXT NOT NULL, is_full INTEGER NOT NULL DEFAULT 0, UNIQUE (prompt, first, second));
CREATE INDEX open_pairs ON pairs (number) WHERE NOT is_full;
CREATE TABLE answers (
    id INTEGER PRIMARY KEY, token TEXT NOT NULL UNIQUE, pair INTEGER NOT NULL REFERENCES pairs,
    person INTEGER NOT NULL REFERENCES people, attention TEXT NOT NULL, left TEXT NOT NULL,
    right TEXT NOT NULL, state TEXT NOT NULL CHECK (state IN ('draft', 'done', 'skipped')),
    answer INTEGER, revision INTEGER NOT NULL DEFAULT 0, seconds REAL NOT NULL DEFAULT 0,
    changed REAL NOT NULL, expires REAL NOT NULL, reason TEXT NOT NULL DEFAULT '',
    UNIQUE (pair, person, attention));
CREATE INDEX answers_of_person ON answers (person, state);
"""
# "RHFs" in ASCII.
SCHEMA = database.Schema(0x52484673, database.PEOPLE + _TABLES, (database.SITE,))
_BESIDE_PROMPTS = """
    SELECT answers.*, prompts.id AS prompt_id, prompts.prompt, prompts.number AS prompt_number
    FROM answers JOIN pairs ON pairs.number = answers.pair JOIN prompts ON prompts.number = pairs.prompt"""
# Places of a pair that others take.
_TAKEN = """(
    SELECT count(*) FROM answers WHERE answers.pair = pairs.number AND answers.person != :person
    AND answers.attention = '' AND (answers.state = 'done' OR state = 'draft' AND expires > :now))"""
# Pairs with a place for a rater.
_FREE = f"""
    FROM pairs WHERE NOT is_full AND {_TAKEN} < :raters AND NOT EXISTS (
    SELECT 1 FROM answers WHERE answers.pair = pairs.number AND answers.person = :person)"""
_FILL = """
    UPDATE pairs SET is_full = :raters <= (
    SELECT count(*) FROM answers WHERE pair = pairs.number AND attention = '' AND state = 'done')"""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt and its images: generator's name -> the file's name in the survey's folder of images."""

    id: str
    text: str
    files: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Work:
    """A pair in a rater's hands. Nothing in it tells the generators.

    Attributes:
      token: names it in the rater's browser.
      prompt: the text.
      answer: 1 to 5, see `survey.answers`; None before the first one.
      revision: number of changes.
      seconds: time spent.
      state: "draft", "done" or "skipped".
    """

    token: str
    prompt: str
    answer: int | None
    revision: int
    seconds: float
    state: str


@dataclasses.dataclass(frozen=True)
class Given:
    """An answer as the export has it, who gave it, and the seconds that it took."""

    answer: Answer
    person: Person
    seconds: float


class Store(People):
    """A survey's database. All times are those of `clock`, in seconds since 1970."""

    def __init__(self, folder: str | pathlib.Path, clock: Callable[[], float] = time.time):
        """Opens a survey.

        Raises:
          errors.UserError: the folder is no survey, its settings are wrong, or a newer version made it.
        """
        self.folder = pathlib.Path(folder)
        self.config = settings.read_config(self.folder)
        self._clock = clock
        place = self.folder / settings.DATABASE
        with database.explained_errors(place):
            super().__init__(database.Database(place, SCHEMA))
            with self._database.transaction() as db:
                # `raters` may have been changed.
                db.execute(_FILL, {"raters": self.config.raters})

    @classmethod
    def create(
        cls,
        folder: pathlib.Path,
        config: settings.Config,
        prompts: Iterable[Prompt],
        clock: Callable[[], float] = time.time,
    ) -> "Store":
        """Makes the database and the settings' files in a folder; each two images of a prompt are a pair.

        Raises:
          errors.UserError: the folder has a database already.
          OSError: it can't be written.
        """
        writing.make_folder(folder)
        database.create(folder / settings.DATABASE, SCHEMA)
        settings.write_config(folder, config)
        store = cls(folder, clock)
        with store._database.transaction() as db:
            for prompt in prompts:
                added = db.execute("INSERT INTO prompts (id, prompt) VALUES (?, ?)", (prompt.id, prompt.text))
                images = [(added.lastrowid, *image) for image in prompt.files.items()]
                db.executemany("INSERT INTO images VALUES (?, ?, ?)", images)
                pairs = [(added.lastrowid, *two) for two in itertools.combinations(prompt.files, 2)]
                db.executemany("INSERT INTO pairs (prompt, first, second) VALUES (?, ?, ?)", pairs)
        return store

    # A rater's work.

    def next_pair(self, person: Person) -> Work | None:
        """Gives a rater their open draft, or else the next pair. Renews its lease.

        Returns None where nothing is left for this rater now.
        """
        now = self._clock()
        with self._database.transaction() as db:
            drafts = self._drafts(db, person.id, now)
            row = drafts[0] if drafts else self._new_draft(db, person.id, now)
            if row is None:
                return None
            self._lease(db, row["id"], now)
            return _work(row)

    def previous(self, person: Person) -> Work:
        """Returns the pair that a rater has answered last, which they may still correct.

        Raises:
          NotYours: they have answered none.
        """
        with self._database.connection() as db:
            if row := self._last_done(db, person.id):
                return _work(row)
        raise NotYours

    def save(self, person: Person, token: str, revision: int, answer: int, seconds: float) -> int:
        """Saves an answer, on the open pair or the one answered last. Returns its new revision.

        Args:
          person: the rater.
          token: the pair's.
          revision: the revision that the answer was made from.
          answer: 1 to 5.
          seconds: time spent on the pair in all.

        Raises:
          NotYours: the pair isn't open for this rater.
          Conflict: the answer has another revision.
          AnswerError: the answer isn't 1 to 5, or the seconds aren't positive.
        """
        with self._database.transaction() as db:
            return self._write(db, self._open(db, person, token, revision), answer, seconds)

    def finish(self, person: Person, token: str, revision: int, answer: int, seconds: float) -> None:
        """Ends a rater's work on a pair. The same answer again changes nothing.

        Args: as `save`.

        Raises:
          NotYours, Conflict, AnswerError: as `save`.
        """
        with self._database.transaction() as db:
            row = self._mine(db, person, token)
            # The reply may have been lost, and the page sends the same again.
            if row["state"] == "done" and row["answer"] == answer:
                return
            row = self._open(db, person, token, revision)
            self._write(db, row, answer, seconds)
            db.execute("UPDATE answers SET state = 'done' WHERE id = ?", (row["id"],))
            db.execute(f"{_FILL} WHERE number = :pair", {"raters": self.config.raters, "pair": row["pair"]})

    def skip(self, person: Person, token: str, revision: int, reason: str) -> None:
        """Ends a rater's work on a pair without an answer; another rater gets it.

        Raises:
          NotYours, Conflict: as `save`.
        """
        with self._database.transaction() as db:
            row = self._open(db, person, token, revision)
            if row["state"] != "draft":
                raise Closed
            db.execute(
                "UPDATE answers SET state = 'skipped', reason = ?, changed = ?, revision = revision + 1"
                " WHERE id = ?",
                (printable(reason), self._clock(), row["id"]),
            )

    def image_path(self, person: Person, token: str, side: str) -> pathlib.Path:
        """Returns the path of an image, `side` is "left" or "right", of a pair that was given to a rater.

        Raises:
          NotYours: it was never given to them.
        """
        with self._database.connection() as db:
            row = self._mine(db, person, token)
            file = db.execute(
                "SELECT file FROM images WHERE prompt = ? AND generator = ?",
                (row["prompt_number"], row[side]),
            ).fetchone()[0]
        return self.folder / settings.IMAGES / file

    def progress(self, person: Person) -> tuple[int, int]:
        """Returns how many pairs a rater has done, and about how many are left; both with checks."""
        with self._database.connection() as db:
            done = self._count(db, person.id, "state != 'draft'")
            values = {"person": person.id, "now": self._clock(), "raters": self.config.raters}
            free = db.execute(f"SELECT count(*) {_FREE}", values).fetchone()[0]
            drafts = self._drafts(db, person.id, values["now"])
        return done, math.ceil(len(drafts) + free / (1 - self.config.check_rate))

    def _rows(self, db: sqlite3.Connection, condition: str, *values: Any) -> list[sqlite3.Row]:
        """Returns answers with their prompts, the last changed first."""
        return db.execute(
            f"{_BESIDE_PROMPTS} WHERE {condition} ORDER BY changed DESC, answers.id DESC", values
        ).fetchall()

    def _drafts(self, db: sqlite3.Connection, person: int, now: float) -> list[sqlite3.Row]:
        """Returns a rater's drafts that still have a place."""
        rows = self._rows(db, "person = ? AND state = 'draft'", person)
        return [row for row in rows if self._has_place(db, row, now)]

    def _count(self, db: sqlite3.Connection, person: int, condition: str) -> int:
        query = f"SELECT count(*) FROM answers WHERE person = ? AND {condition}"
        return db.execute(query, (person,)).fetchone()[0]

    def _mine(self, db: sqlite3.Connection, person: Person, token: str) -> sqlite3.Row:
        rows = self._rows(db, "person = ? AND token = ?", person.id, token)
        if not rows:
            raise NotYours
        return rows[0]

    def _last_done(self, db: sqlite3.Connection, person: int) -> sqlite3.Row | None:
        rows = self._rows(db, "person = ? AND state = 'done'", person)
        return rows[0] if rows else None

    def _open(self, db: sqlite3.Connection, person: Person, token: str, revision: int) -> sqlite3.Row:
        """Returns a rater's draft that has still a place, or their last answer, at the given revision."""
        row = self._mine(db, person, token)
        if row["revision"] != revision:
            raise Conflict(row["revision"], row["answer"])
        if row["state"] == "done":
            last = self._last_done(db, person.id)
            if last and last["id"] == row["id"]:
                return row
        if row["state"] != "draft" or not self._has_place(db, row, self._clock()):
            raise Closed
        return row

    def _has_place(self, db: sqlite3.Connection, row: sqlite3.Row, now: float) -> bool:
        """Tells whether others have left a draft its place, as `annotate.rater_work` does."""
        if row["attention"]:
            return True
        since = math.inf if row["expires"] > now else now
        values = {"person": row["person"], "now": since, "pair": row["pair"]}
        taken = db.execute(f"SELECT {_TAKEN} FROM pairs WHERE number = :pair", values).fetchone()[0]
        return taken < self.config.raters

    def _lease(self, db: sqlite3.Connection, answer_id: int, now: float) -> None:
        end = now + 60 * self.config.lease_minutes
        db.execute("UPDATE answers SET expires = ? WHERE id = ?", (end, answer_id))

    def _write(self, db: sqlite3.Connection, row: sqlite3.Row, answer: int, seconds: float) -> int:
        if answer not in ANSWERS:
            raise AnswerError(f"the answer must be 1 to 5, got {answer!r}")
        if not (math.isfinite(seconds) and seconds >= 0):
            raise AnswerError(f"`seconds` must be a positive number, got {seconds}")
        now, revision = self._clock(), row["revision"] + 1
        db.execute(
            "UPDATE answers SET answer = ?, revision = ?, seconds = max(seconds, ?), changed = ?"
            " WHERE id = ?",
            (answer, revision, seconds, now, row["id"]),
        )
        self._lease(db, row["id"], now)
        return revision

    # The next pair.

    def _new_draft(self, db: sqlite3.Connection, person: int, now: float) -> sqlite3.Row | None:
        """Makes an empty draft of a rater's next pair, or of a check; None where no pair is free."""
        numbers = random.Random(f"{self.config.seed} {person} {self._count(db, person, 'TRUE')}")
        pair = self._free_pair(db, person, now, numbers)
        if pair is None:
            return None
        attention, number = "", pair["number"]
        sides = numbers.sample([pair["first"], pair["second"]], 2)
        if numbers.random() < self.config.check_rate and (known := self._for_check(db, person, numbers)):
            attention, number = numbers.choice(CHECKS), known["pair"]
            sides = [known["right"], known["left"]]
            if attention == IDENTICAL:
                sides = 2 * [numbers.choice(sides)]
        token = secrets.token_urlsafe(9)
        db.execute(
            "INSERT INTO answers (token, pair, person, attention, left, right, state, changed, expires)"
            " VALUES (?, ?, ?, ?, ?, ?, 'draft', ?, 0)",
            (token, number, person, attention, *sides, now),
        )
        return self._rows(db, "token = ?", token)[0]

    def _free_pair(
        self, db: sqlite3.Connection, person: int, now: float, numbers: random.Random
    ) -> sqlite3.Row | None:
        """Draws a pair with a place, of the prompts that the rater has seen least often."""
        values = {"person": person, "now": now, "raters": self.config.raters}
        free = db.execute(f"SELECT number, prompt, first, second {_FREE} ORDER BY number", values).fetchall()
        if not free:
            return None
        seen = dict(
            db.execute(
                "SELECT prompt, count(*) FROM answers JOIN pairs ON pairs.number = answers.pair"
                " WHERE person = ? AND attention = '' GROUP BY prompt",
                (person,),
            ).fetchall()
        )
        least = min(seen.get(pair["prompt"], 0) for pair in free)
        return numbers.choice([pair for pair in free if seen.get(pair["prompt"], 0) == least])

    def _for_check(self, db: sqlite3.Connection, person: int, numbers: random.Random) -> sqlite3.Row | None:
        """Draws an answer for a check: an early one, on a prompt without a check of this rater so far."""
        done = self._rows(db, "person = ? AND state = 'done'", person)
        checked = {row["prompt_number"] for row in self._rows(db, "person = ? AND attention != ''", person)}
        early = [
            row
            for row in done[CHECK_DISTANCE - 1 :]
            if not row["attention"] and row["prompt_number"] not in checked
        ]
        return numbers.choice(early) if early else None

    # What was answered.

    def given(self, names: bool = False) -> Iterator[Given]:
        """Yields the finished answers, checks included, in the order in which they were begun.

        Raters have pseudonyms unless their `names` are asked for.
        """
        people = {person.id: person for person in self.people()}
        with self._database.connection() as db:
            for row in db.execute(f"{_BESIDE_PROMPTS} WHERE state = 'done' ORDER BY answers.id"):
                person = people[row["person"]]
                fields = [row[name] for name in ("left", "right", "answer", "attention")]
                answer = Answer(row["prompt_id"], row["prompt"], person.known_as(names), *fields)
                yield Given(answer, person, row["seconds"])

    def counts(self) -> tuple[int, int]:
        """Returns the number of pairs that have all answers, and of all pairs."""
        with self._database.connection() as db:
            query = "SELECT count(*) FILTER (WHERE is_full), count(*) FROM pairs"
            return tuple(db.execute(query).fetchone())

    def skips(self) -> dict[int, int]:
        """Returns how many pairs each rater has skipped: the person's id -> number."""
        with self._database.connection() as db:
            query = "SELECT person, count(*) FROM answers WHERE state = 'skipped' GROUP BY person"
            return dict(db.execute(query).fetchall())


def _work(row: sqlite3.Row) -> Work:
    return Work(**{field.name: row[field.name] for field in dataclasses.fields(Work)})
