"""Decides which item a rater gets next, in the transaction that then gives it, so that no two raters collide.

An item has as many places as answers are wanted. A finished answer takes one for good, unless it is excluded,
and so does a first answer before a suggestion. Another draft takes one until its lease expires. Gold items
have no limit: each rater answers each of them once, as long as another item is free for them.

Each rater has a shuffle of their own: the next item is the first free one at or behind a place that follows
from the seed, the rater and the number of their answers. Items of higher priority come first.
"""

import random
import sqlite3
from typing import Any

from richhf_jax.annotate.project import Config

# Places of an item that others take. Where _FREE counts them, the rater has none.
_TAKEN = """(
    SELECT count(*) FROM answers
    WHERE answers.item = items.number AND answers.person != :person AND answers.excluded IS NULL
    AND (answers.state = 'done'
         OR answers.state = 'draft' AND (answers.first IS NOT NULL OR answers.expires > :now)))"""
_MINE = "(SELECT 1 FROM answers WHERE answers.item = items.number AND answers.person = :person)"
_FREE = f"""
    FROM items WHERE items.state = 'open' AND items.gold IS NULL AND NOT EXISTS {_MINE}
    AND {_TAKEN} < :raters"""
_CALIBRATION = "SELECT * FROM items WHERE gold IS NOT NULL AND state = 'open' ORDER BY number LIMIT :first"


def next_number(db: sqlite3.Connection, config: Config, person: int, now: float) -> int | None:
    """Returns the number of the item that a rater who has no draft gets next; None if there is none."""
    values: dict[str, Any] = {"person": person, "now": now, "raters": config.raters}
    random_numbers = random.Random(f"{config.seed} {person} {_count(db, person)}")
    best = db.execute(f"SELECT priority {_FREE} ORDER BY priority DESC, number LIMIT 1", values).fetchone()
    # Gold items check other answers. Where no other item is left, they'd be idle work, and known as gold.
    if best is None:
        return None
    if random_numbers.random() < config.gold_rate and (gold := _gold(db, config, person)) is not None:
        return gold
    last = db.execute("SELECT max(number) FROM items").fetchone()[0]
    values |= {"priority": best[0], "place": random_numbers.randint(1, last)}
    for side in (">=", "<"):
        query = (
            f"SELECT number {_FREE} AND priority = :priority AND number {side} :place ORDER BY number LIMIT 1"
        )
        if found := db.execute(query, values).fetchone():
            return found[0]
    raise AssertionError("an item of this priority was free in the same transaction")


def calibration_numbers(db: sqlite3.Connection, config: Config) -> list[int]:
    """Returns the numbers of the first round's items."""
    rows = db.execute(f"SELECT number FROM ({_CALIBRATION})", {"first": config.calibration_items})
    return [row[0] for row in rows]


def other_places(db: sqlite3.Connection, item: int, person: int, now: float) -> int:
    """Returns how many places of an item others take; at the time infinity no lease runs."""
    query = f"SELECT {_TAKEN} FROM items WHERE number = :item"
    return db.execute(query, {"item": item, "person": person, "now": now}).fetchone()[0]


def _count(db: sqlite3.Connection, person: int) -> int:
    return db.execute("SELECT count(*) FROM answers WHERE person = ?", (person,)).fetchone()[0]


def _gold(db: sqlite3.Connection, config: Config, person: int) -> int | None:
    """Returns a gold item behind the first round's that the rater hasn't had; None if there is none."""
    query = f"""
        SELECT number FROM items WHERE gold IS NOT NULL AND state = 'open' AND NOT EXISTS {_MINE}
        AND number NOT IN (SELECT number FROM ({_CALIBRATION})) ORDER BY number LIMIT 1"""
    found = db.execute(query, {"person": person, "first": config.calibration_items}).fetchone()
    return found and found[0]
