"""The rater's page in a real browser: real clicks and keys, and what the store has afterwards."""

import time

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.actions import interaction, pointer_input
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from richhf_jax import feedback
from richhf_jax.annotate import server

# The images' size, see conftest.py.
WIDTH, HEIGHT = 640, 480


def exactly(*points):
    """Compares points to the hundredths of a pixel that the page rounds to."""
    return [pytest.approx(point, abs=0.0051) for point in points]


def test_click_drag_remove_undo_redo(page):
    page.open()
    first, second = page.click(100, 120), page.click(300, 200)
    assert page.points["implausibility"] == exactly(first, second)
    page.type("m")
    third = page.click(500, 60)
    assert page.points["misalignment"] == exactly(third)
    # The disk is drawn in its true size.
    assert page.run("return document.querySelector('.disk').r.baseVal.value") == HEIGHT / 20
    moved = page.drag(second, (350, 260))
    assert page.points["implausibility"] == exactly(first, moved)
    page.click(*first)
    assert page.points["implausibility"] == exactly(moved)
    page.type("zzz")
    assert page.points == {"implausibility": exactly(first, second), "misalignment": []}
    page.type("y")
    assert page.points["misalignment"] == exactly(third)
    page.type(Keys.BACKSPACE)
    page.wait_until_saved()
    answer = page.work("train/0.png").answer
    assert answer["implausibility_points"] == exactly(first, second)
    assert answer["misalignment_points"] == []


def test_by_keyboard_alone(page):
    page.open()
    # The first image is perfect: six keys.
    page.type("n5432")
    page.type(Keys.ENTER)
    page.wait(lambda: "1 done" in page.find("#count").text)
    first = page.work("train/0.png")
    assert first.state == "done"
    assert first.answer["ratings"] == dict(zip(feedback.SCORES, (5, 4, 3, 2), strict=True))
    assert all(first.answer["nothing"].values())
    # The second one is not. The cursor begins in the middle.
    page.wait(lambda: page.run("return document.getElementById('words').textContent.includes('dogs')"))
    page.type("i", " ", "m", *[Keys.ARROW_RIGHT] * 2, Keys.ARROW_UP, " ")
    page.type("w", Keys.ARROW_RIGHT, " ", "1234", Keys.ESCAPE, "c", "seen twice", Keys.ESCAPE)
    step = HEIGHT // 40
    assert page.points["implausibility"] == [(WIDTH / 2, HEIGHT / 2)]
    assert page.points["misalignment"] == [(WIDTH / 2 + 2 * step, HEIGHT / 2 - step)]
    # A point with the focus goes by one pixel with Shift, and with several presses in one step of undo.
    page.run("document.querySelector('.mark.misalignment').focus()")
    ActionChains(page.driver).key_down(Keys.SHIFT).send_keys(Keys.ARROW_DOWN * 2).key_up(Keys.SHIFT).perform()
    assert page.points["misalignment"] == [(WIDTH / 2 + 2 * step, HEIGHT / 2 - step + 2)]
    page.type("z")
    assert page.points["misalignment"] == [(WIDTH / 2 + 2 * step, HEIGHT / 2 - step)]
    # A scale is answered again.
    page.type("ss5")
    page.wait_until_saved()
    second = page.work("train/1.png")
    assert second.answer["token_labels"] == [1, 0, 1]
    assert second.answer["comment"] == "seen twice"
    page.type(Keys.ESCAPE, Keys.ENTER)
    page.wait(lambda: page.work("train/1.png").state == "done")
    assert page.work("train/1.png").answer["ratings"] == dict(zip(feedback.SCORES, (1, 5, 3, 4), strict=True))


def test_what_is_missing_is_told(page):
    page.open()
    page.click(100, 100)
    page.word("cat").click()
    page.type(Keys.ESCAPE, "3", Keys.ENTER)
    page.wait(lambda: page.find("#missing").text)
    missing = [e.get_attribute("data-part") for e in page.driver.find_elements(By.CSS_SELECTOR, ".missing")]
    assert missing == ["misalignment", "alignment", "aesthetics", "overall"]
    assert (
        page.run("return document.activeElement.name + document.activeElement.value") == "nothingmisalignment"
    )
    # What has marks can't be "nothing": the box is disabled until the marks are gone.
    assert not page.find("[value=implausibility][name=nothing]").is_enabled()
    page.type(" ", "333", Keys.ENTER)
    page.wait(lambda: page.work("train/0.png").state == "done")
    # The browser itself logs the refusal.
    assert ["422" in line["message"] for line in page.driver.get_log("browser")] == [True]


def test_a_draft_is_resumed(page):
    page.open()
    point = page.click(200, 100)
    page.word("red").click()
    page.type("4")
    page.wait_until_saved()
    page.reload()
    assert page.points["implausibility"] == exactly(point)
    assert page.word("red").get_attribute("aria-pressed") == "true"
    assert page.find("[name=plausibility]:checked").get_attribute("value") == "4"


def test_two_tabs_never_overwrite_silently(page):
    page.open()
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    second = page.driver.current_window_handle
    try:
        page.driver.set_screen(1280, "light")
        page.driver.get(page.site.address)
        page.wait_for_task()
        theirs = page.click(100, 100)
        page.wait_until_saved()
        page.driver.switch_to.window(first)
        mine = page.click(400, 300)
        page.wait(lambda: page.find("#conflict").is_displayed())
        assert page.work("train/0.png").answer["implausibility_points"] == exactly(theirs)
        # Escape decides nothing.
        page.type(Keys.ESCAPE)
        page.wait(lambda: page.find("#conflict").is_displayed())
        page.find("#conflict [value=theirs]").click()
        page.wait_until_saved()
        assert page.points["implausibility"] == exactly(theirs)
        # The answers of this tab are not lost.
        page.type("z")
        page.wait_until_saved()
        assert page.work("train/0.png").answer["implausibility_points"] == exactly(mine)
        page.driver.switch_to.window(second)
        both = page.click(200, 200)
        page.wait(lambda: page.find("#conflict").is_displayed())
        page.find("#conflict [value=mine]").click()
        page.wait_until_saved()
        assert page.work("train/0.png").answer["implausibility_points"] == exactly(theirs, both)
        # The browser itself logs the two refusals.
        assert {line["message"].split(" - ")[1][:40] for line in page.driver.get_log("browser")} == {
            "Failed to load resource: the server responded"[:40]
        }
        page.driver.close()
    finally:
        page.driver.switch_to.window(first)


def test_the_browser_keeps_what_the_server_cannot_save(page):
    page.open()
    first = page.click(100, 100)
    page.wait_until_saved()
    page.site.stop()
    second = page.click(400, 300)
    page.wait(lambda: "Not saved yet" in page.find("#saved").text)
    page.type("4")
    page.site.start()
    page.wait_until_saved()
    assert page.work("train/0.png").answer["implausibility_points"] == exactly(first, second)
    assert page.work("train/0.png").answer["ratings"]["plausibility"] == 4
    # The tab may even be closed before the server is back.
    page.site.stop()
    page.type("5")
    page.wait(lambda: "Not saved yet" in page.find("#saved").text)
    page.driver.get("about:blank")
    page.site.start()
    page.driver.get(page.site.address)
    page.wait_for_task()
    page.wait_until_saved()
    assert page.work("train/0.png").answer["ratings"] == dict.fromkeys(feedback.SCORES) | {
        "plausibility": 4,
        "alignment": 5,
    }
    assert page.find("[name=alignment]:checked").get_attribute("value") == "5"
    page.driver.get_log("browser")


def test_what_the_browser_keeps_of_another_project_stays_away(page):
    page.open()
    page.site.stop()
    page.click(10, 10)
    page.wait(lambda: "kept in this browser" in page.find("#saved").text)
    owner = f"richhf_jax {page.site.store.site_id()} {page.site.store.person(page.site.secret).id}"
    keys = page.run("return Object.keys(localStorage).sort()")
    assert keys == [f"{owner} has read", f"{owner} train/0.png"]
    # Another project at this address, with the same image and a rater of the same number.
    with page.site.store._database.transaction() as db:
        db.execute("UPDATE site SET id = 'another'")
    page.driver.get("about:blank")
    page.site.app = server.make_app(page.site.store)
    page.site.start()
    page.driver.get(page.site.address)
    page.wait(lambda: page.find("#guidelines").is_displayed())
    page.type(Keys.ENTER)
    page.wait(lambda: page.find("#task").is_displayed())
    assert page.points == {"implausibility": [], "misalignment": []}
    assert page.work("train/0.png").revision == 0
    # The browser itself logs what failed.
    page.driver.get_log("browser")


def test_zoom_and_pan_keep_points_in_place(page):
    page.open()
    point = page.click(200, 100)
    page.type("+++")
    box = "return document.getElementById('image').getAttribute('viewBox').split(' ').map(Number)"
    assert page.run(box)[2] == pytest.approx(WIDTH / 1.5**3)
    # A drag beside the points moves the image and marks nothing.
    page.drag((400, 400), (300, 350))
    assert page.points["implausibility"] == exactly(point)
    left, top, width, height = page.run(box)
    assert width == pytest.approx(WIDTH / 1.5**3)
    x, y = page.click(400, 100)
    expected = left + (x + 0.5) / WIDTH * width, top + (y + 0.5) / HEIGHT * height
    assert page.points["implausibility"] == exactly(point, expected)
    page.type("0")
    assert page.run(box) == [-0.5, -0.5, WIDTH, HEIGHT]
    assert page.points["implausibility"] == exactly(point, expected)


def test_skip_needs_a_reason_and_broken_does_not(page):
    page.open()
    page.type("k")
    page.find("#leave .primary").click()
    assert page.find("#leave").is_displayed()
    page.type("hurts my eyes")
    page.find("#leave .primary").click()
    page.wait(lambda: page.work("train/0.png").state == "skipped")
    page.wait(lambda: page.run("return document.getElementById('words').textContent.includes('dogs')"))
    page.type("b")
    page.find("#leave .primary").click()
    page.wait(lambda: page.work("train/1.png").state == "broken")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_shows_all_of_it_readably(page, theme):
    page.open(390, theme)
    page.click(100, 100)
    page.word("cat").click()
    page.type("3")
    assert page.run("return [document.documentElement.scrollWidth, innerWidth]") == [390, 390]
    for contrast, text in page.driver.contrasts():
        assert contrast >= 4.5, text
    # Nothing that is pressed by a finger is too small for it (WCAG 2.5.8: 24 pixels).
    small = page.run(
        "return [...document.querySelectorAll('button, label, .mark')].filter((e) => e.checkVisibility())"
        ".filter((e) => Math.min(e.getBoundingClientRect().width, e.getBoundingClientRect().height) < 23.5)"
        ".map((e) => e.outerHTML)"
    )
    assert small == []


def test_controls_have_names_for_screen_readers(page):
    page.open()
    page.click(100, 100)
    page.wait_until_saved()
    controls = page.driver.find_elements(
        By.CSS_SELECTOR, "#task :is(input, button, textarea, svg, .mark), header button"
    )
    visible = [c for c in controls if page.run("return arguments[0].checkVisibility()", c)]
    names = [control.accessible_name for control in visible]
    assert all(names)
    assert page.find(".mark").accessible_name.startswith("implausibility point 1 at 100, 10")
    assert page.find("#image").accessible_name.endswith('made from: A red cat, "happy" as ever!')


def test_keys_are_told(page):
    page.open()
    page.type("?")
    assert page.find("#keys").is_displayed()
    # The dialog takes the keys while it is open.
    page.type("5")
    page.type(Keys.ESCAPE)
    assert not page.driver.find_elements(By.CSS_SELECTOR, ".likert :checked")
    page.type("g")
    assert page.find("#guidelines").is_displayed()


def test_keys_of_one_letter_can_be_turned_off(page):
    page.open()
    page.type("?")
    # Enter closes the dialog, as before.
    assert page.run("return document.activeElement.textContent") == "Close"
    page.find("#single-keys").click()
    page.type(Keys.ESCAPE)
    told = "return [...document.querySelectorAll('[aria-keyshortcuts]')].map((e) => e.ariaKeyShortcuts)"
    for _ in range(2):
        page.type(*"mnzyhkbgIMWsc15+-?")
        page.type("0")
        assert not page.driver.find_elements(By.CSS_SELECTOR, "dialog[open], #task :checked:not([name=kind])")
        assert page.find("[name=kind]:checked").get_attribute("value") == "implausibility"
        assert page.run("return document.activeElement.id") == "image"
        assert page.run(told) == ["Control+Z", "Control+Y", "Enter Control+Enter"]
        # The browser remembers it.
        page.reload()
    # Keys with other names and those with Ctrl stay.
    page.type(" ", " ", Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, " ")
    assert len(page.points["implausibility"]) == 2
    page.type(Keys.BACKSPACE)
    assert len(page.points["implausibility"]) == 1
    for key, count in (("z", 2), ("y", 1)):
        ActionChains(page.driver).key_down(Keys.CONTROL).send_keys(key).key_up(Keys.CONTROL).perform()
        assert len(page.points["implausibility"]) == count
    page.type(Keys.ENTER)
    page.wait(lambda: "misalignment" in page.find("#missing").text)
    page.find("#show-keys").click()
    page.find("#single-keys").click()
    page.type(Keys.ESCAPE, "n4")
    assert page.find("[name=plausibility]:checked").get_attribute("value") == "4"
    page.reload()
    page.type("m")
    assert page.find("[name=kind]:checked").get_attribute("value") == "misalignment"
    # The browser itself logs the refusal of the empty answer.
    assert ["422" in line["message"] for line in page.driver.get_log("browser")] == [True]


def test_a_link_in_a_mail_works_at_once(page):
    """Coming from another site, the browser must get the cookie and send it."""
    page.driver.set_screen(1280, "light")
    page.driver.get(f"data:text/html,<a href='{page.site.address}/r/{page.site.secret}'>link</a>")
    page.find("a").click()
    page.wait(lambda: page.run("return document.getElementById('guidelines')?.open"))
    assert page.driver.current_url == f"{page.site.address}/"


def touches(driver, *fingers):
    """Lets fingers move at once; each is a list of places in CSS pixels."""
    inputs = [
        pointer_input.PointerInput(interaction.POINTER_TOUCH, f"finger {i}") for i in range(len(fingers))
    ]
    for finger, (start, *places) in zip(inputs, fingers, strict=True):
        finger.create_pointer_move(duration=0, x=start[0], y=start[1])
        finger.create_pointer_down(button=0)
        for x, y in places:
            finger.create_pointer_move(duration=50, x=x, y=y)
        finger.create_pointer_up(button=0)
    chain = ActionBuilder(driver)
    chain.devices = inputs
    chain.perform()


def test_fingers_mark_scroll_and_zoom(page):
    page.open(390)
    pixel, point = page.place(300, 200)
    touches(page.driver, [pixel])
    page.wait(lambda: page.points["implausibility"] == exactly(point))
    # A finger that moves upwards scrolls the page.
    touches(page.driver, [(200, 350), (200, 300), (200, 200)])
    page.wait(lambda: page.run("return scrollY") > 50)
    assert len(page.points["implausibility"]) == 1
    page.run("scrollTo(0, 0)")
    x, y = pixel
    touches(page.driver, [(x - 20, y), (x - 40, y)], [(x + 20, y), (x + 40, y)])
    left, top, width, _ = page.run(
        "return document.getElementById('image').getAttribute('viewBox').split(' ').map(Number)"
    )
    assert width == pytest.approx(WIDTH / 2, rel=0.05)
    # The place between the fingers stays between them.
    share = (point[0] + 0.5) / WIDTH, (point[1] + 0.5) / HEIGHT
    assert left + share[0] * width == pytest.approx(point[0], abs=5)
    assert top + share[1] * width * HEIGHT / WIDTH == pytest.approx(point[1], abs=5)
    assert page.points["implausibility"] == exactly(point)


def test_idle_time_is_left_out(page):
    # A clock that the test can turn.
    clock = (
        "window.turned = 0; const now = performance.now.bind(performance);"
        "performance.now = () => now() + turned;"
    )
    script = page.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": clock})
    try:
        started = time.monotonic()
        page.open()
        page.type("1")
        for pause in (20_000, 60_000):
            page.run("turned += arguments[0]", pause)
            page.type("1")
        page.wait_until_saved()
        spent = page.work("train/0.png").seconds
        assert 20 < spent < 20 + time.monotonic() - started
    finally:
        page.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


def test_practice_shows_our_answer_and_must_be_passed(make_page, make_site):
    page = make_page(make_site(gold=True, calibration_items=1))
    page.open()
    assert page.find("#practice").is_displayed()
    page.type("n1111", Keys.ENTER)
    page.wait(lambda: page.find("#feedback").is_displayed())
    # Two parts of seven are right: no misaligned points, no misaligned word.
    assert page.find("#feedback-lines").text.splitlines() == [
        "Your answer is 29% like ours.",
        "The practice begins again: on average, answers must be 70% like ours.",
    ]
    circle = page.run(
        "const c = document.querySelector('#gold circle'); return [c.cx, c.cy].map((v) => v.baseVal.value)"
    )
    assert circle == [100, 100]
    golden = "return [...document.querySelectorAll('.likert .gold input')].map((field) => field.value)"
    assert page.run(golden) == ["4"] * 4
    # The answer is closed.
    page.click(300, 300)
    page.type("5", Keys.BACKSPACE)
    assert page.points["implausibility"] == []
    page.type(Keys.ENTER)
    page.wait(lambda: not page.find("#feedback").is_displayed())
    assert page.find("#practice").is_displayed()
    assert page.run(golden) == []
    page.click(101, 101)
    page.type("n4444", Keys.ENTER)
    page.wait(lambda: page.find("#feedback").is_displayed())
    assert "You have passed" in page.find("#feedback-lines").text
    page.find("[data-action=next]").click()
    page.wait(lambda: "dogs" in page.find("#words").text)
    assert not page.find("#practice").is_displayed()
