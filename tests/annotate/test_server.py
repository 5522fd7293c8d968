"""The server: links, cookies, and what it refuses."""

import re
import sqlite3

import pytest
from starlette.testclient import TestClient

from richhf_jax.annotate import server, web

ORIGIN = {"Origin": "http://testserver"}
ITEM = "/api/items/train%2F0.png"


def work_of(store):
    [rater] = store.people()
    return store.work(rater, "train/0.png")


def body(store, **changes) -> dict:
    work = work_of(store)
    return {"revision": work.revision, "answer": work.answer, "seconds": 1.5} | changes


def test_a_link_becomes_a_cookie(client, secret):
    for page in ("/", "/api/next", "/image/train%2F0.png"):
        assert client.get(page).status_code == 403
    response = client.get(f"/r/{secret}")
    cookie = response.headers["Set-Cookie"]
    assert re.fullmatch(rf"rater={secret}; HttpOnly; Max-Age=\d+; Path=/; SameSite=strict", cookie)
    assert client.get("/api/next").json()["work"]["id"] == "train/0.png"
    secure = TestClient(client.app, base_url="https://testserver").get(f"/r/{secret}").headers["Set-Cookie"]
    assert secure.endswith("; Secure")


def test_progress_does_not_tell_gold(rater):
    assert rater.get("/api/next").json()["progress"]["total_open"] == 10
    found = [web.about(count) for count in (0, 1, 10, 11, 100, 999, 1204)]
    assert found == [0, 10, 10, 20, 100, 1000, 1300]


def test_saving_and_conflicts(rater, store):
    first = rater.put(ITEM, json=body(store), headers=ORIGIN)
    assert first.json() == {"revision": 1}
    # A replayed request changes nothing.
    again = rater.put(ITEM, json=body(store, revision=0), headers=ORIGIN)
    assert again.status_code == 409
    assert again.json()["revision"] == 1
    assert again.json()["answer"] == work_of(store).answer


@pytest.mark.parametrize(
    ("problem", "status", "told"),
    [("database or disk is full", 507, "disk is full"), ("database is locked", 503, "can't save now")],
)
def test_a_database_that_cannot_save_is_told(rater, store, monkeypatch, problem, status, told):
    def fail(*_):
        raise sqlite3.OperationalError(problem)

    sent = body(store)
    monkeypatch.setattr(store, "save", fail)
    response = rater.put(ITEM, json=sent, headers=ORIGIN)
    assert response.status_code == status
    assert told in response.json()["error"]


def test_an_unknown_address_is_told(rater):
    response = rater.get("/api/none")
    assert (response.status_code, response.json()) == (404, {"error": "Not Found"})


def test_pieces_of_a_prompt():
    for prompt in ('A red cat, "happy" as ever!', "  two  dogs", "a?b", "<b>x</b>"):
        pieces = server._pieces(prompt)
        assert "".join(text for text, _ in pieces) == prompt
        assert [text for text, is_word in pieces if is_word] == server.feedback.tokenize_prompt(prompt)


def test_a_deactivated_rater_is_out(rater, store, secret):
    rater.get(f"/m/{store.make_manager()}")
    [person] = [person for person in store.people() if not person.is_manager]
    assert rater.post("/manage/deactivate", data={"rater": person.id}, headers=ORIGIN).status_code == 200
    assert rater.get("/api/next").status_code == 403
    assert rater.get(f"/r/{secret}").status_code == 403
