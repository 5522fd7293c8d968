"""The manager's pages and decisions, and the figures that they share with `status`."""

import contextlib
import io
import re

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.common.by import By
from starlette.testclient import TestClient

from richhf_jax import errors, feedback
from richhf_jax.annotate import __main__ as command
from richhf_jax.annotate import manage, project, server, transfer
from richhf_jax.annotate.store import Store
from richhf_jax.datasets import consolidate
from richhf_jax.pages import overlay

ORIGIN = {"Origin": "http://testserver"}


@pytest.fixture
def manager(client, store):
    assert client.get(f"/m/{store.make_manager()}").status_code == 200
    return client


def rate(store, name: str, *, value: int | None) -> None:
    """Rates every image: with `value` on all scales that are asked, or by skipping it."""
    person = store.person(store.add_rater(name))
    config = store.config
    while work := store.next_item(person):
        if value is None:
            store.skip(person, work.item.id, work.revision, "<i>grey</i>", broken=False)
        else:
            points = [[10.0 * value, 20.0]] if config.kinds else []
            answer = work.answer | {
                "implausibility_points": points,
                "nothing": {"implausibility": not points, "misalignment": True, "words": True},
                "ratings": work.answer["ratings"] | {scale.name: value for scale in config.scales},
                "comment": "<b>fingers</b>",
            }
            store.finish(person, work.item.id, work.revision, answer, 10.0 * value)


def skip_one(store, name: str) -> None:
    person = store.person(store.add_rater(name))
    work = store.next_item(person)
    store.skip(person, work.item.id, work.revision, "grey", broken=False)


def test_a_manager_sees_progress_and_raters(manager, store):
    rate(store, "Ada", value=2)
    rate(store, "Bo", value=4)
    rate(store, "Cy", value=None)
    page = manager.get("/manage").text
    assert re.search(r"answers</span> 6 of 9", page)
    assert re.search(r"with all answers</span> 0", page)
    rows = re.findall(r"<tr>\s*<th scope=.row.>(\w+)</th>(.*?)</tr>", page, re.DOTALL)
    cells = {name: re.findall(r"<td>(.*?)</td>", row)[:6] for name, row in rows}
    # done, open, skipped, median seconds, gold, plausibility against the others.
    assert cells == {
        "Ada": ["3", "0", "0", "20", "–", "-2.0 ± 0.0"],
        "Bo": ["3", "0", "0", "40", "–", "+2.0 ± 0.0"],
        "Cy": ["0", "0", "3", "–", "–", "–"],
    }
    assert re.search(r"waiting for you</span> 0", page)
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


def post(client, action: str, **form):
    return client.post(f"/manage/{action}", data=form, headers=ORIGIN)


def choices(client, item: str) -> list[str]:
    """The raters whom an image's page offers for it."""
    page = client.get(f"/manage/items/{item}").text
    return re.findall(r"<option value=.\d*.>(.*?)</option>", page)


def test_a_manager_gives_an_image_back_to_all(manager, store):
    rate(store, "Ada", value=None)
    rate(store, "Bo", value=None)
    cy = store.person(store.add_rater("Cy"))
    assert store.next_item(cy) is None
    assert "waiting for you</span> 3" in manager.get("/manage").text
    assert choices(manager, "train/2.png") == ["anyone", "Ada", "Bo", "Cy"]
    assert post(manager, "reassign", item="train/2.png", rater="").url.path == "/manage/items/train/2.png"
    assert store.next_item(cy).item.id == "train/2.png"
    assert post(manager, "reassign", item="none").status_code == 400
    # Who skipped it doesn't get it again, unless it is given to them.
    [ada] = [person for person in store.people() if person.name == "Ada"]
    assert store.next_item(ada) is None
    assert post(manager, "reassign", item="train/2.png", rater=ada.id).status_code == 200
    assert (work := store.next_item(ada)).item.id == "train/2.png"
    assert work.state == "draft"
    given = store.answers(finished=False, item_id="train/2.png")
    assert [a.reason for a in given if a.state == "draft" and a.person.id == ada.id] == [""]


def test_a_manager_gives_an_image_to_one_rater(manager, store):
    ada, bo, cy = (store.person(store.add_rater(name)) for name in ("Ada", "Bo", "Cy"))
    # It wasn't skipped; the rater gets it before the others.
    assert choices(manager, "train/2.png") == ["Ada", "Bo", "Cy"]
    assert post(manager, "reassign", item="train/2.png", rater=bo.id).status_code == 200
    assert store.next_item(bo).item.id == "train/2.png"
    assert store.next_item(ada).item.id == "train/0.png"
    store.deactivate(cy.id)
    assert choices(manager, "train/2.png") == ["Ada", "Bo"]
    for rater, told in (
        (cy.id, "no active rater"),
        (99, "no active rater"),
        (next(person.id for person in store.people() if person.is_manager), "no active rater"),
        ("x", "must be a number"),
    ):
        response = post(manager, "reassign", item="train/2.png", rater=rater)
        assert (response.status_code, told in response.text) == (400, True)


def test_an_image_that_is_full_or_answered_is_not_given(make_store):
    with contextlib.closing(make_store(raters=2)) as store:
        rate(store, "Ada", value=2)
        ada, bo, cy = store.people()[0], *(store.person(store.add_rater(name)) for name in ("Bo", "Cy"))
        assert store.candidates("train/0.png") == [bo, cy]
        with pytest.raises(errors.UserError, match="has answered train/0.png"):
            store.reassign("train/0.png", ada.id)
        store.reassign("train/0.png", bo.id)
        # Bo's draft holds the last place.
        assert store.candidates("train/0.png") == [bo]
        with pytest.raises(errors.UserError, match="exclude an answer first"):
            store.reassign("train/0.png", cy.id)


def test_the_practice_comes_first_and_gold_is_given_to_none(make_store):
    with contextlib.closing(make_store(gold=True, calibration_items=1)) as store:
        ada = store.person(store.add_rater("Ada"))
        assert store.candidates("train/1.png") == []
        with pytest.raises(errors.UserError, match="in the practice"):
            store.reassign("train/1.png", ada.id)
        work = store.next_item(ada)
        store.finish(
            ada, work.item.id, 0, work.item.gold | {"nothing": dict.fromkeys(work.answer["nothing"], True)}, 1
        )
        assert [person.name for person in store.candidates("train/1.png")] == ["Ada"]
        with pytest.raises(errors.UserError, match="is a gold image"):
            store.reassign("train/0.png", ada.id)


def first_answer(store, name: str) -> int:
    return next(a.id for a in store.answers(finished=False) if a.person.name == name)


def test_an_exclusion_can_be_undone_until_others_took_the_place(manager, store):
    for name in ("Ada", "Bo", "Cy"):
        rate(store, name, value=3)
    ada = first_answer(store, "Ada")
    item = next(a.item.id for a in store.answers() if a.id == ada)
    assert "Count it again" not in manager.get(f"/manage/items/{item}").text
    post(manager, "exclude", answer=ada, reason="asleep")
    assert "Count it again" in manager.get(f"/manage/items/{item}").text
    assert post(manager, "include", answer=ada).url.path == f"/manage/items/{item}"
    assert {a.excluded for a in store.answers()} == {None}
    dee = store.person(store.add_rater("Dee"))
    assert store.next_item(dee) is None
    post(manager, "exclude", answer=ada, reason="asleep")
    # While somebody is at work, and when they have finished.
    work = store.next_item(dee)
    assert work.item.id == item
    assert "raters are at work on it" in post(manager, "include", answer=ada).text
    store.finish(dee, item, 0, next(a.answer for a in store.answers()), 1)
    assert post(manager, "include", answer=ada).status_code == 400
    assert sum(a.excluded is None for a in store.answers() if a.item.id == item) == 3
    assert post(manager, "include", answer=99).status_code == 404
    # A draft can neither be excluded nor counted.
    store.exclude(first_answer(store, "Dee"), "late")
    eve = store.person(store.add_rater("Eve"))
    store.next_item(eve)
    for action in ("exclude", "include"):
        assert post(manager, action, answer=first_answer(store, "Eve"), reason="x").status_code == 404


def test_skips_that_no_longer_count(manager, store):
    for name in ("Ada", "Bo"):
        rate(store, name, value=None)
    item = next(a.item.id for a in store.answers(finished=False))
    assert item in store.for_manager()
    # One skip of two is excluded: the image is open again.
    skips = [a.id for a in store.answers(finished=False, item_id=item)]
    post(manager, "exclude", answer=skips[0], reason="a mistake")
    assert item not in store.for_manager()
    assert "Count it again" not in manager.get(f"/manage/items/{item}").text
    assert "was skipped" in post(manager, "include", answer=skips[0]).text
    # Nor does an image come back to the manager for a skip that was undone by giving it back.
    post(manager, "reassign", item=item)
    for skip in skips:
        assert post(manager, "include", answer=skip).status_code == 400
    cy = store.person(store.add_rater("Cy"))
    assert store.next_item(cy).item.id == item


def test_a_gold_image_that_two_skip_waits_for_the_manager(make_store):
    store = make_store(gold=True, calibration_items=0, gold_rate=0.99, raters=2)
    rate(store, "Ada", value=3)
    for name in ("Bo", "Cy"):
        skip_one(store, name)
    view = manage.overview(store)
    assert view["waiting"] == ["train/0.png"]
    first = view["items"][0]
    assert (first["id"], first["waits"], first["is_gold"], first["answers"]) == ("train/0.png", True, True, 1)
    assert [item["is_gold"] for item in view["items"]] == [True, False, False]
    store.reassign("train/0.png")
    assert [item["is_gold"] for item in manage.overview(store)["items"]] == [False, False]
    assert store.next_item(store.person(store.add_rater("Dee"))).item.gold
    store.close()


def test_status_and_page_show_the_same_figures(make_store, capsys):
    store = make_store(gold=True, calibration_items=0, gold_rate=0.99, raters=2)
    skip_one(store, "Cy")
    rate(store, "Ada", value=2)
    rate(store, "Bo", value=4)
    other = next(a for a in store.answers() if a.person.name == "Ada" and a.item.gold is None)
    store.exclude(other.id, "asleep")
    with TestClient(server.make_app(store)) as client:
        client.get(f"/m/{store.make_manager()}")
        page = client.get("/manage").text
    rows = re.findall(r"<tr>\s*<th scope=.row.>(\w+)</th>(.*?)</tr>", page, re.DOTALL)
    shown = {name: re.findall(r"<td>(.*?)</td>", row)[:5] for name, row in rows}
    folder = store.folder
    store.close()
    with pytest.raises(SystemExit):
        command.main(["status", str(folder)])
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "1 of 2 images have 2 answers"
    assert {line.split()[0]: line.split()[1:] for line in lines[1:]} == shown
    # Of the seven parts on the gold image, Ada has one kind of points and the words right; Bo has all
    # right but one kind of points. A skipped gold image is no answer.
    assert shown == {
        "Ada": ["2", "0", "0", "20", f"{2 / 7:.2f}"],
        "Bo": ["3", "0", "0", "40", f"{6 / 7:.2f}"],
        "Cy": ["0", "0", "1", "–", "–"],
    }


def test_a_skipped_practice_image_counts_as_wrong(make_store):
    with contextlib.closing(make_store(gold=True, calibration_items=1)) as store:
        ada = store.person(store.add_rater("Ada"))
        work = store.next_item(ada)
        store.skip(ada, work.item.id, 0, "", broken=False)
        # The practice begins again.
        assert store.next_item(ada).is_calibration


def test_the_heatmap_is_the_consolidated_one(manager, store):
    rate(store, "Ada", value=2)
    rate(store, "Bo", value=4)
    rate(store, "Cy", value=1)
    given = [r for r in transfer.counted_ratings(store) if r.image_id == "train/0.png"]
    excluded = next(a.id for a in store.answers(item_id="train/0.png") if a.person.name == "Cy")
    for expected, action in ((given, None), (given[:2], "exclude")):
        if action:
            post(manager, action, answer=excluded, reason="asleep")
        reply = manager.get("/manage/heatmap/implausibility/train%2F0.png")
        record = consolidate.consolidate(expected)[feedback.HEATMAP_FIELDS["implausibility"]]
        mean = np.asarray(Image.open(io.BytesIO(record))) / np.float32(255)
        np.testing.assert_array_equal(
            np.asarray(Image.open(io.BytesIO(reply.content))), np.asarray(overlay.picture(mean))
        )
    page = manager.get("/manage/items/train/0.png").text
    assert page.count("/manage/heatmap/implausibility/train%2F0.png") == 1
    # Nothing is marked as misaligned.
    assert "/manage/heatmap/misalignment" not in page
    for address in ("misalignment/train%2F0.png", "keywords/train%2F0.png", "implausibility/none"):
        assert manager.get(f"/manage/heatmap/{address}").status_code == 404


def test_images_are_found_by_name_and_prompt(manager, store):
    for text, found in (("DOGS", ["1"]), ("train/2", ["2"]), ("", ["0", "1", "2"]), ("<script>", ["1"])):
        page = manager.get("/manage", params={"search": text}).text
        assert re.findall(r"/manage/items/train%2F(\d).png", page) == found
        assert "answers</span> 0 of 9" in page
    assert "None has this in its name or prompt." in manager.get("/manage?search=none").text


PAGES = ("/manage", "/manage/agreement", "/manage/items/train/0.png")


@pytest.mark.parametrize(
    "asked",
    [
        {"kinds": ()},
        {"kinds": (), "words": "", "scales": project.Config.scales[:1]},
        {"kinds": (), "scales": ()},
        {"words": "", "scales": ()},
    ],
)
def test_pages_of_a_project_that_asks_only_parts(make_store, asked):
    with (
        contextlib.closing(make_store(raters=2, **asked)) as store,
        TestClient(server.make_app(store)) as client,
    ):
        client.get(f"/m/{store.make_manager()}")
        # First without raters, then without answers, then with one and two of them.
        for name in (None, "Ada", "Bo", "Cy"):
            if name in ("Bo", "Cy"):
                rate(store, name, value=2)
            elif name:
                store.add_rater(name)
            for path in PAGES:
                page = client.get(path)
                assert page.status_code == 200
                assert not re.search(r"\bnan\b|\bNone\b(?!<|\.)|Undefined", page.text)
        agreement = client.get("/manage/agreement").text
        names = [scale.name for scale in asked.get("scales", project.Config.scales)]
        assert re.findall(r"<th scope=.row.>(\w+)</th>", agreement) == names
        assert ("κ" in agreement) == bool(asked.get("words", True))
        assert agreement.count("points, σ") == len(asked.get("kinds", project.Config.kinds))


def test_parts_that_are_asked_later_have_no_invented_answers(make_store, tmp_path):
    store = make_store(raters=2, scales=project.Config.scales[:1])
    for name, value in (("Ada", 2), ("Bo", 4)):
        rate(store, name, value=value)
    project.write_config(store.folder, project.Config())
    store.close()
    with contextlib.closing(Store(store.folder)) as store:
        view = manage.overview(store)
        assert [bool(view["raters"][0]["scores"][name]) for name in feedback.SCORES] == [
            True,
            False,
            False,
            False,
        ]
        assert view["items"][0]["apart"] == 2
        found = manage.agreement(store)
        assert (found["left_out"], found["has_shared"]) == (6, False)
    for form in ("raw", "label-studio"):
        with pytest.raises(SystemExit) as end:
            command.main(["export", str(store.folder), str(tmp_path / "out"), f"--format={form}"])
        assert "train/0.png: rater-1 answered it before alignment, aesthetics" in str(end.value)


# What a screen reader can operate, or shows as a picture.
CONTROLS = {
    "button",
    "checkbox",
    "combobox",
    "image",
    "link",
    "progressbar",
    "region",
    "searchbox",
    "textbox",
}


def controls(driver) -> list[tuple[str, str]]:
    """Returns the roles and names of a page's controls in the browser's accessibility tree."""
    nodes = driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    seen = [node for node in nodes if not node["ignored"]]
    found = [(node["role"]["value"], node["name"]["value"]) for node in seen if "name" in node]
    return [(role, name) for role, name in found if role in CONTROLS]


def test_a_browser_shows_the_managers_pages_readably(make_page, make_site):
    page = make_page(site := make_site())
    rate(site.store, "Bo", value=4)
    rate(site.store, "Cy", value=2)
    rate(site.store, "Dee", value=None)
    site.store.exclude(first_answer(site.store, "Bo"), "asleep")
    page.driver.get(f"{site.address}/m/{site.store.make_manager()}")
    page.wait(lambda: page.driver.current_url.endswith("/manage"))
    titles = set()
    for path in PAGES:
        for width, theme in ((1280, "light"), (390, "dark")):
            page.driver.set_screen(width, theme)
            page.driver.get(site.address + path)
            page.wait(lambda: page.run("return document.readyState === 'complete'"))
            assert page.run("return document.documentElement.scrollWidth <= innerWidth")
            for contrast, text in page.driver.contrasts():
                assert contrast >= 4.5, text
            # Pictures have arrived.
            assert page.run("return [...document.images].every((image) => image.naturalWidth)")
            found = controls(page.driver)
            assert all(name for _, name in found)
            # Several buttons of one name could not be told apart.
            operable = [control for control in found if control[0] in ("button", "textbox")]
            assert len(set(operable)) == len(operable)
            titles.add(page.driver.title)
    assert len(titles) == len(PAGES)
    assert ("image", "The image with the consolidated implausibility heatmap") in found
    # A decision by the page's own forms, with the browser's Origin.
    page.find('[aria-label="Count Bo\'s answer again"]').click()
    page.wait(lambda: not page.driver.find_elements(By.CSS_SELECTOR, "[action='/manage/include']"))
    assert {answer.excluded for answer in site.store.answers()} == {None}
    page.find("select").send_keys("Dee")
    page.find("[action='/manage/reassign'] button").click()
    page.wait(lambda: [a.state for a in site.store.answers(False, "train/0.png")].count("draft"))


def test_figures_add_up_where_fewer_answers_are_asked(make_store):
    store = make_store(raters=3)
    rate(store, "Ada", value=2)
    rate(store, "Bo", value=4)
    cy = store.person(store.add_rater("Cy"))
    assert store.next_item(cy)
    assert [rater["open"] for rater in manage.overview(store)["raters"]] == [0, 0, 1]
    path = store.folder / "config.json"
    path.write_text(path.read_text().replace('"raters": 3', '"raters": 1'))
    store.close()
    with contextlib.closing(Store(store.folder)) as store:
        found = manage.overview(store)
    assert found["counts"] == {"images": 3, "finished": 3, "answers": 6, "wanted": 6}
    # A draft without a place isn't open.
    assert [rater["open"] for rater in found["raters"]] == [0, 0, 0]
