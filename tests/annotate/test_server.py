"""The server: links, cookies, and what it refuses."""

import re
import sqlite3

import pytest
from starlette.testclient import TestClient

from richhf_jax import feedback
from richhf_jax.annotate import server

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


def rate(store, name: str, *, value: int | None) -> None:
    """Rates every image: with `value` on all scales, or by skipping it."""
    person = store.person(store.add_rater(name))
    while work := store.next_item(person):
        if value is None:
            store.skip(person, work.item.id, work.revision, "<i>grey</i>", broken=False)
        else:
            answer = work.answer | {
                "implausibility_points": [[10.0 * value, 20.0]],
                "nothing": {"implausibility": False, "misalignment": True, "words": True},
                "ratings": dict.fromkeys(feedback.SCORES, value),
                "comment": "<b>fingers</b>",
            }
            store.finish(person, work.item.id, work.revision, answer, 10.0 * value)


def test_a_manager_sees_progress_and_raters(manager, store):
    rate(store, "Ada", value=2)
    rate(store, "Bo", value=4)
    rate(store, "Cy", value=None)
    page = manager.get("/manage").text
    assert re.search(r"answers</span> 6 of 9", page)
    assert re.search(r"with all answers</span> 0", page)
    rows = re.findall(r"<tr>\s*<th scope=.row.>(\w+)</th>(.*?)</tr>", page, re.DOTALL)
    cells = {name: re.findall(r"<td>(.*?)</td>", row)[:5] for name, row in rows}
    # done, skipped, median seconds, gold, plausibility against the others.
    assert cells == {
        "Ada": ["3", "0", "20", "–", "-2.0 ± 0.0"],
        "Bo": ["3", "0", "40", "–", "+2.0 ± 0.0"],
        "Cy": ["0", "3", "–", "–", "–"],
    }
    assert page.count("2 answers, 2.00 points apart, skipped: &lt;i&gt;grey&lt;/i&gt;") == 3
    assert "two dogs &lt;script&gt;" in page


def test_a_manager_sees_all_answers_of_an_image_and_may_exclude_one(manager, store):
    rate(store, "Ada", value=2)
    rate(store, "Bo", value=4)
    page = manager.get("/manage/items/train/0.png").text
    assert page.count("&lt;b&gt;fingers&lt;/b&gt;") == 2
    assert re.findall(r'<circle cx="([\d.]+)" cy="20.0" r="24.0">', page) == ["20.0", "40.0"]
    assert manager.get("/manage/image/train/0.png").headers["Content-Type"] == "image/png"
    answer = next(answer for answer in store.answers() if answer.item.id == "train/0.png")
    form = {"answer": answer.id, "reason": "asleep"}
    assert manager.post("/manage/exclude", data=form).status_code == 403  # Without an origin.
    assert manager.post("/manage/exclude", data=form, headers=ORIGIN).status_code == 200
    assert [a.excluded for a in store.answers() if a.id == answer.id] == ["asleep"]
    assert "excluded: asleep" in manager.get("/manage/items/train/0.png").text
    assert manager.post("/manage/exclude", data=form | {"answer": "99"}, headers=ORIGIN).status_code == 404
    assert manager.post("/manage/exclude", data=form | {"answer": "x"}, headers=ORIGIN).status_code == 400


def test_a_manager_sees_the_agreement(manager, store):
    assert "No image has answers of two raters yet." in manager.get("/manage/agreement").text
    rate(store, "Ada", value=2)
    rate(store, "Bo", value=3)
    page = manager.get("/manage/agreement").text
    cells = re.findall(r"<th scope=.row.>plausibility</th>(.*?)</tr>", page)
    assert re.findall(r"<td>(.*?)</td>", cells[0])[:3] == ["3", "0.00", "1.00"]


def test_a_manager_gives_an_image_back(manager, store):
    rate(store, "Ada", value=None)
    rate(store, "Bo", value=None)
    cy = store.person(store.add_rater("Cy"))
    assert store.next_item(cy) is None
    assert "Give it back" in manager.get("/manage/items/train/2.png").text
    assert manager.post("/manage/reassign", data={"item": "train/2.png"}, headers=ORIGIN).status_code == 200
    assert store.next_item(cy).item.id == "train/2.png"
    assert manager.post("/manage/reassign", data={"item": "none"}, headers=ORIGIN).status_code == 400


def test_a_deactivated_rater_is_out(rater, store, secret):
    rater.get(f"/m/{store.make_manager()}")
    [person] = [person for person in store.people() if not person.is_manager]
    assert rater.post("/manage/deactivate", data={"rater": person.id}, headers=ORIGIN).status_code == 200
    assert rater.get("/api/next").status_code == 403
    assert rater.get(f"/r/{secret}").status_code == 403
