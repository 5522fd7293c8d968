"""Attacks by raters, by other sites' pages, and by who guesses; each section is one kind.

Attacks by files, addresses and long requests are in test_attacks_raw.py.
"""

import contextlib
import dataclasses
import html.parser
import json
import urllib.parse
from xml.etree import ElementTree

import pytest
from starlette.testclient import TestClient

from richhf_jax.annotate import project, records, server, transfer, web

WIDTH, HEIGHT = 640, 480
ORIGIN = {"Origin": "http://testserver"}
ITEM = "/api/items/train%2F0.png"
SCRIPT = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'"


def work_of(store):
    return store.work(store.people()[0], "train/0.png")


def body(store, **changes) -> dict:
    work = work_of(store)
    return {"revision": work.revision, "answer": work.answer, "seconds": 1.5} | changes


def answers_of(store) -> list:
    """Returns all answers, but for what the raters have become meanwhile."""
    found = store.answers(finished=False)
    return [dataclasses.replace(answer, person=answer.person.name) for answer in found]


def full(answer, value=3, **changes) -> dict:
    """Returns an answer with all parts."""
    return {
        **answer,
        "nothing": dict.fromkeys(answer["nothing"], True),
        "ratings": dict.fromkeys(answer["ratings"], value),
        **changes,
    }


def writes(sent: dict) -> list[tuple[str, str, dict]]:
    """Returns all requests that change an answer: method, address, body."""
    skip = {"revision": sent["revision"], "reason": "why", "broken": False}
    return [("PUT", ITEM, sent), ("POST", f"{ITEM}/done", sent), ("POST", f"{ITEM}/skip", skip)]


# ---- Secrets.


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


def test_made_up_secrets_open_nothing(client):
    for secret in ("x", "x" * 50_000, "%00", "%ff", "..%2f..", "%2e%2e", "' OR 1=1 --", "é"):
        for kind in "rm":
            response = client.get(f"/{kind}/{secret}")
            assert response.status_code in (403, 404)
            assert "Set-Cookie" not in response.headers


def test_void_secrets_open_nothing(rater, store, secret):
    sent = body(store)
    before = answers_of(store)
    [person] = store.people()
    store.renew("Ada")
    for _ in ("renewed", "deactivated"):
        assert [rater.get(page).status_code for page in ("/", "/api/next", f"/r/{secret}")] == [403] * 3
        assert rater.get("/image/train%2F0.png").status_code == 403
        for method, place, sending in writes(sent):
            assert rater.request(method, place, json=sending, headers=ORIGIN).status_code == 403
        assert answers_of(store) == before
        rater.cookies.clear()
        secret = store.renew("Ada")
        assert rater.get(f"/r/{secret}").status_code == 200
        assert rater.get("/api/next").status_code == 200
        before = answers_of(store)
        store.deactivate(person.id)


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


# ---- Another rater's item.


def test_another_raters_item_is_out_of_reach(client, store, secret):
    bo = store.person(store.add_rater("Bo"))
    work = store.next_item(bo)
    assert store.save(bo, work.item.id, 0, work.answer | {"comment": "Bo's"}, 1) == 1
    before = answers_of(store)
    client.get(f"/r/{secret}")
    sent = {"revision": 1, "answer": full(work.answer), "seconds": 1.0}
    assert client.get("/image/train%2F0.png").status_code == 404
    for method, place, sending in writes(sent):
        assert client.request(method, place, json=sending, headers=ORIGIN).status_code == 404
    assert answers_of(store) == before
    # Nor does a rater see or change it who has the same item.
    given = client.get("/api/next").json()["work"]
    assert (given["id"], given["answer"], given["revision"]) == ("train/0.png", work.answer, 0)
    assert client.post(f"{ITEM}/done", json=sent | {"revision": 0}, headers=ORIGIN).status_code == 200
    assert answers_of(store)[:1] == before


# ---- Requests sent again.


def test_requests_that_are_sent_again_change_nothing(rater, store):
    first = body(store)
    done = body(store, revision=1, answer=full(work_of(store).answer))
    assert rater.put(ITEM, json=first, headers=ORIGIN).json() == {"revision": 1}
    assert rater.put(ITEM, json=first, headers=ORIGIN).status_code == 409
    assert rater.post(f"{ITEM}/done", json=done, headers=ORIGIN).status_code == 200
    before = answers_of(store)
    # The same end is told to be there; all else is refused.
    assert rater.post(f"{ITEM}/done", json=done, headers=ORIGIN).status_code == 200
    for revision in (0, 1, 2, -1, 10**400):
        sent = body(store, revision=revision, answer=full(first["answer"], 5))
        for method, place, sending in writes(sent):
            response = rater.request(method, place, json=sending, headers=ORIGIN)
            assert response.status_code == (404 if revision == 2 else 409)
    assert answers_of(store) == before
    # Nor does it take back what the manager decided.
    store.exclude(before[0].id, "asleep")
    assert rater.post(f"{ITEM}/done", json=done, headers=ORIGIN).status_code == 200
    assert [(answer.excluded, answer.answer) for answer in answers_of(store)] == [("asleep", done["answer"])]
    assert next(store.answers()).excluded == "asleep"


def test_a_skip_that_is_sent_again_counts_once(rater, store):
    sent = {"revision": 0, "reason": "too dark", "broken": False}
    for _ in range(2):
        assert rater.post(f"{ITEM}/skip", json=sent, headers=ORIGIN).status_code == 200
    for other in (sent | {"reason": "other"}, sent | {"broken": True}):
        assert rater.post(f"{ITEM}/skip", json=other, headers=ORIGIN).status_code == 409
    [answer] = answers_of(store)
    assert (answer.state, answer.reason, answer.revision) == ("skipped", "too dark", 1)
    assert store.for_manager() == []


# ---- Forged requests.


@pytest.mark.parametrize("origin", [None, "null", "http://evil.example", "http://testserver.evil.example"])
def test_writes_from_other_sites_are_refused(rater, store, origin):
    headers = {"Origin": origin} if origin else {}
    before = work_of(store).revision
    for method, place, sending in writes(body(store)):
        response = rater.request(method, place, json=sending, headers=headers)
        assert response.status_code == 403
        assert "another site" in response.json()["error"]
    assert work_of(store).revision == before


def test_a_request_for_another_host_is_refused(rater, store, secret):
    sent = body(store)
    headers = ORIGIN | {"Host": "evil.example"}
    assert rater.put(ITEM, json=sent, headers=headers).status_code == 403
    # A name of another site that leads here has no cookie of ours.
    other = TestClient(rater.app, base_url="http://evil.example")
    assert other.put(ITEM, json=sent, headers={"Origin": "http://evil.example"}).status_code == 403
    assert work_of(store).revision == 0


def test_forms_and_json_are_not_taken_for_each_other(rater, manager, store):
    before = answers_of(store)
    form = {"revision": "0", "answer": "{}", "seconds": "1"}
    for method, place, _ in writes(body(store)):
        assert rater.request(method, place, data=form, headers=ORIGIN).status_code == 400
    for name, field in (("deactivate", "rater"), ("exclude", "answer"), ("reassign", "item")):
        assert manager.post(f"/manage/{name}", json={field: 1}, headers=ORIGIN).status_code == 400
        for value in ("", "-1", "1.0", "١", "1" * 400, "1 OR 1=1", "\0"):
            response = manager.post(f"/manage/{name}", data={field: value}, headers=ORIGIN)
            assert response.status_code == 400
        files = {field: ("1", b"1")}
        assert manager.post(f"/manage/{name}", files=files, headers=ORIGIN).status_code == 400
    assert answers_of(store) == before
    assert all(person.active for person in store.people())


def test_other_methods_are_refused(rater, manager, store):
    before = answers_of(store)
    right = {"/": "GET", "/api/next": "GET", ITEM: "PUT", "/image/train%2F0.png": "GET", "/manage": "GET"}
    right |= {"/manage/exclude": "POST", "/manage/items/train%2F0.png": "GET"}
    for place, known in right.items():
        for method in {"OPTIONS", "TRACE", "DELETE", "PATCH", "POST", "PUT", "GET", "EVIL"} - {known}:
            assert rater.request(method, place, headers=ORIGIN).status_code == 405
    assert answers_of(store) == before


HUGE = "9" * 400
BROKEN_BODIES = [
    b"",
    b"{",
    b"[]",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"revision": 0}',
    b'{"revision": true, "answer": {}, "seconds": 1}',
    b'{"revision": 0, "answer": [], "seconds": 1}',
    b"\xff\xfe",
    *(
        f'{{"revision": 0, "answer": ANSWER, "seconds": {seconds}}}'.encode()
        for seconds in ("-1", "NaN", "Infinity", "1e999", "1e300", HUGE, "9" * 5000, "true", '"1"')
    ),
    b'{"revision": 0, "answer": {}, "seconds": 1}',
    b'{"revision": 0, "answer": ANSWER, "answer": 1, "seconds": 1}',
]


def test_broken_bodies_are_refused(rater, store):
    before = answers_of(store)
    right = json.dumps(full(work_of(store).answer)).encode()
    for sent in BROKEN_BODIES:
        for method, place in (("PUT", ITEM), ("POST", f"{ITEM}/done")):
            response = rater.request(method, place, content=sent.replace(b"ANSWER", right), headers=ORIGIN)
            assert (response.status_code, bool(response.json()["error"])) == (400, True), sent[:99]
    assert answers_of(store) == before


@pytest.mark.parametrize(
    ("field", "values"),
    [
        (
            "implausibility_points",
            ["{}", "[1]", "[[1]]", "[[1, NaN]]", "[[1, 1e999]]", "[[-9, 1]]", "[[1, true]]"],
        ),
        ("token_labels", ["[]", "[2, 2, 2]", "[null]", "[" + "1, " * 9_999 + "1]"]),
        ("nothing", ["{}", "[]", '{"words": 1, "implausibility": true, "misalignment": true}']),
        ("ratings", ["{}", "[]", '{"overall": 7}', '{"<b>": 1}']),
        ("comment", ["1", "null", "{}", "NaN"]),
    ],
)
def test_values_of_another_form_are_refused(rater, store, field, values):
    text = json.dumps(body(store, answer=work_of(store).answer | {field: "VALUE"}))
    # Bombs of nested lists, also those that are parsed but not written.
    depths = (*range(900, 1001, 4), 5_000, 20_000, 100_000)
    for value in [*values, HUGE, f"[{HUGE}]", *("[" * depth + "]" * depth for depth in depths)]:
        sent = text.replace('"VALUE"', value).encode()
        assert rater.put(ITEM, content=sent, headers=ORIGIN).status_code == 400
    assert work_of(store).revision == 0


# ---- Texts.


@pytest.mark.parametrize("text", ["\ud800 a\0b \u202e \r\n\x1b[31m", "x" * 10_000])
def test_any_text_can_be_shown_and_exported(rater, manager, store, text):
    sent = body(store, answer=full(work_of(store).answer, comment=text))
    assert rater.put(ITEM, content=json.dumps(sent), headers=ORIGIN).status_code == 200
    assert rater.get("/api/next").json()["work"]["revision"] == 1
    # Also when its reply is lost.
    done = json.dumps(sent | {"revision": 1})
    for _ in range(2):
        assert rater.post(f"{ITEM}/done", content=done, headers=ORIGIN).status_code == 200
    item = rater.get("/api/next").json()["work"]["id"]
    skip = {"revision": 0, "reason": text, "broken": True}
    place = f"/api/items/{item.replace('/', '%2F')}/skip"
    for _ in range(2):
        assert rater.post(place, content=json.dumps(skip), headers=ORIGIN).status_code == 200
    for page in ("/manage", f"/manage/items/{item}", "/manage/items/train/0.png"):
        assert manager.get(page).status_code == 200
    "".join(transfer.raw_lines(store, True)).encode()
    "".join(transfer.scores_csv(store, True)).encode()
    json.dumps(transfer.label_studio_tasks(store, True), ensure_ascii=False, allow_nan=False).encode()


def test_texts_are_bounded(rater, store):
    before = answers_of(store)
    text = "x" * 10_001
    sent = body(store, answer=work_of(store).answer | {"comment": text})
    assert rater.put(ITEM, json=sent, headers=ORIGIN).status_code == 400
    skip = {"revision": 0, "reason": text, "broken": True}
    assert rater.post(f"{ITEM}/skip", json=skip, headers=ORIGIN).status_code == 400
    assert answers_of(store) == before


def harm(page: str) -> list:
    """Returns what a page has that its templates don't."""
    found = []

    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            values = dict(attrs)
            place = values.get("href") or values.get("src") or "/"
            is_ours = tag != "script" or place.startswith("/static/")
            is_still = not any(name.startswith("on") or name == "style" for name in values)
            if not (is_ours and is_still and tag not in ("img", "style") and place[0] in "/#"):
                found.append((tag, attrs))

    Parser().feed(page)
    return found


def test_no_text_becomes_html(make_store):
    config = project.Config()
    settings = {
        "title": SCRIPT,
        "words": SCRIPT,
        "guidelines": f"{SCRIPT}\n\n[x](javascript:alert(3)) <b onclick=alert(4)>",
        "kinds": tuple(dataclasses.replace(kind, question=SCRIPT) for kind in config.kinds),
        "scales": tuple(
            dataclasses.replace(scale, question=SCRIPT, anchors=(SCRIPT,) * 5) for scale in config.scales
        ),
    }
    with contextlib.closing(make_store(**settings)) as store:
        item = records.Item(SCRIPT, SCRIPT, "0.png", WIDTH, HEIGHT, None, 1)
        store.add_items([item])
        client = TestClient(server.make_app(store))
        names = [SCRIPT, f"2{SCRIPT}", f"3{SCRIPT}"]
        for number, name in enumerate(names):
            person = store.person(store.add_rater(name))
            work = store.next_item(person)
            assert work.item.id == SCRIPT
            if number == 2:
                store.skip(person, SCRIPT, 0, SCRIPT, True)
            else:
                store.finish(person, SCRIPT, 0, full(work.answer, comment=SCRIPT), 1)
        client.get(f"/r/{store.renew(SCRIPT)}")
        client.get(f"/m/{store.make_manager()}")
        place = urllib.parse.quote(SCRIPT, safe="")
        pages = ["/", "/manage", "/manage/agreement", f"/manage/items/{place}", f"/{place}", f"/r/{place}"]
        pages = [client.get(page) for page in pages]
        store.exclude(1, SCRIPT)
        pages.append(client.get(f"/manage/items/{place}"))
        assert [page.status_code for page in pages] == [200, 200, 200, 200, 404, 404, 200]
        for page in pages:
            assert page.headers["Content-Type"] == "text/html; charset=utf-8"
            assert harm(page.text) == []
        # The texts are there, as texts.
        assert [html.unescape(page.text).count(SCRIPT) > 0 for page in pages[:4]] == [True] * 4
        for answer in (client.get("/api/next"), client.get(f"/api/{place}"), client.get("/image/none")):
            assert answer.headers["Content-Type"] in ("application/json", "text/html; charset=utf-8")
        labelling = ElementTree.fromstring(transfer.label_studio_config(store))
        assert "script" not in {element.tag for element in labelling.iter()}


# ---- Headers.


def test_every_response_has_the_headers(rater, manager, store, monkeypatch):
    image = rater.get("/static/annotate.js")
    requests = [
        ("GET", "/", {}, 200),
        ("HEAD", "/", {}, 200),
        ("GET", "/api/next", {}, 200),
        ("GET", "/image/train%2F0.png", {}, 200),
        ("GET", "/static/annotate.js", {}, 200),
        ("GET", "/static/annotate.js", {"If-None-Match": image.headers["ETag"]}, 304),
        ("GET", "/static/look.css", {}, 200),
        ("GET", "/static/icon.svg", {}, 200),
        ("GET", "/static/none", {}, 404),
        ("GET", "/static", {}, 404),
        ("GET", "/manage", {}, 200),
        ("GET", "/manage/items/train/0.png", {}, 200),
        ("GET", "/manage/image/train/0.png", {}, 200),
        ("GET", "/manage/agreement", {}, 200),
        ("GET", "/nothing", {}, 404),
        ("GET", "/api/nothing", {}, 404),
        ("GET", "/r/wrong", {}, 403),
        ("PUT", ITEM, {}, 403),
        ("PUT", ITEM, ORIGIN, 400),
        ("PUT", ITEM, ORIGIN | {"Content-Length": str(1 << 30)}, 413),
        ("POST", "/", ORIGIN, 405),
        ("OPTIONS", "/api/next", ORIGIN, 405),
        ("POST", "/manage/exclude", ORIGIN, 400),
    ]
    replies = [
        (rater.request(method, place, headers=more), status) for method, place, more, status in requests
    ]

    def fail(*_):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(store, "next_item", fail)
    broken = TestClient(rater.app, cookies=rater.cookies, raise_server_exceptions=False)
    replies.append((broken.get("/api/next"), 500))
    assert "a fault" not in replies[-1][0].text
    rater.cookies.clear()
    rater.cookies.set("rater", "wrong")
    replies += [(rater.get("/"), 403) for _ in range(web.MAX_WRONG - 1)] + [(rater.get("/"), 429)]
    for reply, status in replies:
        assert reply.status_code == status
        assert {name: reply.headers.get(name) for name in web.HEADERS} == web.HEADERS
        assert reply.headers["Cache-Control"]
        if reply.headers.get("Content-Type", "").startswith("text/html"):
            assert harm(reply.text) == []
    policy = web.HEADERS["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in policy
    assert web.HEADERS["X-Content-Type-Options"] == "nosniff"
    assert web.HEADERS["Referrer-Policy"] == "same-origin"
