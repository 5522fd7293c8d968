"""The survey's server: nothing tells the generators, and what it refuses."""

import pytest
from starlette.testclient import TestClient

from richhf_jax.survey import server

ORIGIN = {"Origin": "http://testserver"}


@pytest.fixture
def store(make):
    [store] = make(12, names="", check_rate=0.5)
    return store


@pytest.fixture
def enter(store):
    """Opens a link of a new rater, as their browser does."""

    def enter(name: str) -> TestClient:
        client = TestClient(server.make_app(store))
        assert client.get(f"/r/{store.add_rater(name)}").status_code == 200
        return client

    return enter


@pytest.fixture
def ann(enter):
    return enter("ann")


def next_of(client) -> dict:
    return client.get("/api/next").json()["work"]


def send(client, work: dict, way: str = "", **changes):
    body = {"revision": work["revision"], "answer": 2, "seconds": 1.5} | changes
    method = "POST" if way else "PUT"
    return client.request(method, f"/api/pairs/{work['token']}{way}", json=body, headers=ORIGIN)


def test_nothing_tells_the_generators(ann, store):
    seen, tokens = [], []
    seen += [ann.get(path) for path in ("/", "/static/survey.js", "/static/rater.js", "/static/survey.css")]
    while work := next_of(ann):
        tokens.append(work["token"])
        seen += [ann.get(f"/image/{work['token']}/{side}") for side in ("left", "right")]
        seen += [ann.get("/api/next"), send(ann, work), send(ann, work, "/done", revision=1)]
        seen += [ann.get("/api/previous"), send(ann, work, "/done", answer=4)]
    checks = {one.answer.check for one in store.given()}
    assert checks == {"", "identical", "swapped"}
    assert len(set(tokens)) == len(tokens) > 12
    statuses = {response.status_code for response in seen}
    assert statuses == {200, 409}
    for response in seen:
        # Names of generators and of their files, and the kinds of checks.
        told = f"{response.url} {dict(response.headers)}".encode() + response.content
        for secret in (b"tuned", b"plain", b"t.png", b"p.png", b"identical", b"swapped"):
            assert secret not in told, (response.url, secret)
        assert not {"etag", "last-modified"} & set(response.headers) or "/static/" in str(response.url)
    images = [response for response in seen if "/image/" in str(response.url)]
    assert {response.headers["Content-Type"] for response in images} == {"image/png"}
    # Addresses differ in the token and the side, and headers in the length.
    ends = {str(response.url).rpartition("/")[2] for response in images}
    assert ends == {"left", "right"}
    heads = [{name: value for name, value in r.headers.items() if name != "content-length"} for r in images]
    assert all(head == heads[0] for head in heads)


def test_saving_correcting_and_conflicts(ann, store):
    first = next_of(ann)
    assert ann.get("/api/previous").status_code == 404
    assert set(first) == {"token", "prompt", "answer", "revision", "seconds", "state"}
    assert send(ann, first).json() == {"revision": 1}
    conflict = send(ann, first, answer=5)
    assert conflict.status_code == 409
    assert (conflict.json()["revision"], conflict.json()["answer"]) == (1, 2)
    assert send(ann, first, "/done", revision=1).status_code == 200
    assert send(ann, first, "/done", revision=1).status_code == 200
    second = next_of(ann)
    previous = ann.get("/api/previous").json()["work"]
    assert (previous["token"], previous["state"], previous["answer"]) == (first["token"], "done", 2)
    assert send(ann, previous, answer=1).status_code == 200
    assert next_of(ann) == second
    assert send(ann, second, "/done").status_code == 200
    # Another one was answered since.
    assert send(ann, previous, answer=3, revision=3).status_code == 404
    assert [one.answer.answer for one in store.given()] == [1, 2]


def test_other_raters_pairs_are_not_found(ann, enter, store):
    bob = enter("bob")
    work = next_of(ann)
    for response in (
        send(bob, work),
        send(bob, work, "/done"),
        send(bob, work, "/skip", reason="no"),
        bob.get(f"/image/{work['token']}/left"),
        ann.get(f"/image/{work['token']}/middle"),
        ann.get(f"/image/{work['token']}/..%2F..%2Fsurvey.db"),
        ann.get("/image/0/left"),
    ):
        assert response.status_code == 404
    assert list(store.given()) == []
    assert next_of(ann) == work


def test_without_a_link_or_from_another_site_nothing_is_done(ann, store):
    stranger = TestClient(ann.app)
    for path in ("/", "/api/next", "/api/previous", f"/image/{next_of(ann)['token']}/left"):
        assert stranger.get(path).status_code == 403
    work = next_of(ann)
    for headers in ({}, {"Origin": "http://evil.example"}):
        for way in ("", "/done", "/skip"):
            body = {"revision": 0, "answer": 1, "seconds": 1, "reason": "x"}
            path = f"/api/pairs/{work['token']}{way}"
            response = ann.request("POST" if way else "PUT", path, json=body, headers=headers)
            assert response.status_code == 403
    assert next_of(ann) == work


@pytest.mark.parametrize(
    "changes",
    [
        {"answer": 0},
        {"answer": 6},
        {"answer": None},
        {"answer": True},
        {"answer": "2"},
        {"seconds": -1},
        {"revision": "0"},
    ],
)
def test_wrong_answers_are_refused(ann, changes):
    work = next_of(ann)
    for way in ("", "/done"):
        response = send(ann, work, way, **changes)
        assert response.status_code == 400
        assert response.json()["error"]
    assert next_of(ann) == work


def test_texts_are_no_markup(ann, store):
    page = ann.get("/").text
    assert store.config.question in page
    assert "<script>" not in page
    assert next_of(ann)["prompt"].startswith('a "cat" <b>')
