"""The server: links, cookies, and what it refuses."""

import re
import sqlite3

import anyio
import pytest
from PIL import Image
from starlette.testclient import TestClient

from richhf_jax.annotate import server, web

ORIGIN = {"Origin": "http://testserver"}
ITEM = "/api/items/train%2F0.png"


@pytest.fixture
def secret(store):
    return store.add_rater("Ada")


@pytest.fixture
def rater(client, secret):
    """Opens a link, as a rater does, and gets the first image."""
    assert client.get(f"/r/{secret}").status_code == 200
    assert client.get("/api/next").json()["work"]["id"] == "train/0.png"
    return client


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


def test_wrong_secrets_are_limited(store, secret):
    now = [0.0]
    attempts = web.Attempts(lambda: now[0])
    assert attempts.person(store, "here", secret)
    for _ in range(web.MAX_WRONG):
        assert attempts.person(store, "here", "wrong") is None
    with pytest.raises(web.HTTPException, match="Too many wrong links"):
        attempts.person(store, "here", "wrong")
    # Who was there before goes on working, and so do other addresses.
    assert attempts.person(store, "here", secret)
    assert attempts.person(store, "there", "wrong") is None
    now[0] = 60
    assert attempts.person(store, "here", "wrong") is None


def test_the_limit_holds_for_links_and_cookies(client):
    statuses = [client.get("/r/wrong").status_code for _ in range(web.MAX_WRONG + 1)]
    assert statuses == [403] * web.MAX_WRONG + [429]
    client.cookies.set("rater", "guess")
    assert client.get("/api/next").status_code == 429


def test_every_response_has_the_headers(rater):
    for page in (
        "/",
        "/api/next",
        "/image/train%2F0.png",
        "/static/annotate.js",
        "/static/look.css",
        "/nothing",
    ):
        headers = rater.get(page).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "same-origin"
        assert (
            "default-src 'none'; script-src 'self'; style-src 'self';" in headers["Content-Security-Policy"]
        )
        assert "unsafe" not in headers["Content-Security-Policy"]
    page = rater.get("/").text
    assert not re.search(r"<script(?![^>]* src=)|<style| style=| on\w+=|https?://", page)


@pytest.mark.parametrize("origin", [None, "null", "http://evil.example", "http://testserver.evil.example"])
def test_writes_from_other_sites_are_refused(rater, store, origin):
    headers = {"Origin": origin} if origin else {}
    before = work_of(store).revision
    for method, path in (("PUT", ITEM), ("POST", f"{ITEM}/done"), ("POST", f"{ITEM}/skip")):
        response = rater.request(method, path, json=body(store), headers=headers)
        assert response.status_code == 403
        assert "another site" in response.json()["error"]
    assert work_of(store).revision == before


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


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 100_000,
        b'{"revision": 0}',
        b'{"revision": true, "answer": {}, "seconds": 1}',
        b'{"revision": 0, "answer": [], "seconds": 1}',
        b'{"revision": 0, "answer": {}, "seconds": -1}',
        b'{"revision": 0, "answer": {}, "seconds": NaN}',
        b'{"revision": 0, "answer": {}, "seconds": 1e999}',
        b"\xff\xfe",
    ],
)
def test_broken_bodies_are_refused(rater, sent):
    response = rater.put(ITEM, content=sent, headers=ORIGIN)
    assert response.status_code == 400
    assert response.json()["error"]


def test_a_huge_body_is_not_read(rater, secret):
    assert rater.put(ITEM, content=b"x" * (web.MAX_BODY + 1), headers=ORIGIN).status_code == 413
    # Without a length: the server stops reading.
    read, sent = [], []

    async def receive():
        read.append(1)
        return {"type": "http.request", "body": bytes(1 << 16), "more_body": len(read) < 1 << 14}

    async def send(message):
        sent.append(message)

    headers = [
        (b"host", b"testserver"),
        (b"origin", b"http://testserver"),
        (b"cookie", f"rater={secret}".encode()),
    ]
    scope = {"type": "http", "method": "PUT", "path": "/api/items/train/0.png", "query_string": b""}
    anyio.run(rater.app, scope | {"headers": headers}, receive, send)
    assert sent[0]["status"] == 413
    assert len(read) <= web.MAX_BODY // (1 << 16) + 1


@pytest.mark.parametrize(
    "item",
    [
        "train%2F9.png",
        "train%2F1.png",
        "..%2F..%2Fproject.db",
        "%2Fetc%2Fpasswd",
        "../../project.db",
        "train/0.png%00",
    ],
)
def test_other_items_are_not_found(rater, store, item):
    assert rater.get(f"/image/{item}").status_code == 404
    assert rater.put(f"/api/items/{item}", json=body(store), headers=ORIGIN).status_code == 404
    assert rater.get(f"/static/{item}").status_code == 404


def test_types_of_images_come_from_their_bytes(rater, store):
    file = store.image_path(work_of(store).item)
    assert rater.get("/image/train%2F0.png").headers["Content-Type"] == "image/png"
    Image.open(file).save(file, "JPEG")
    response = rater.get("/image/train%2F0.png")
    assert response.headers["Content-Type"] == "image/jpeg"
    assert response.content == file.read_bytes()
    file.write_text("<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>")
    response = rater.get("/image/train%2F0.png")
    assert response.status_code == 404
    assert "onload" not in response.text


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


def test_raters_are_no_managers(rater, store, secret):
    rater.cookies.set("manager", secret)
    for page in ("/manage", "/manage/items/train/0.png", "/manage/image/train/0.png"):
        assert rater.get(page).status_code == 403
    for action in ("deactivate", "exclude", "reassign"):
        assert rater.post(f"/manage/{action}", data={}, headers=ORIGIN).status_code == 403
    # Nor does a manager's secret rate.
    rater.cookies.clear()
    rater.cookies.set("rater", store.make_manager())
    assert rater.get("/api/next").status_code == 403
