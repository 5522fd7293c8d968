"""The survey's page in a real browser: raters answer by keys, and the result is what they pressed."""

import functools
import json
import types

import pytest
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.keys import Keys

from richhf_jax.survey import __main__ as survey
from richhf_jax.survey import statistics
from richhf_jax.survey.answers import ANSWERS, Answer
from richhf_jax.survey.server import make_app

# Reads a pixel of each image as the rater sees it: left, right.
PIXELS = """
const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
return ["left", "right"].map((side) => {
  context.drawImage(document.getElementById(side), 0, 0, 1, 1);
  return [...context.getImageData(0, 0, 1, 1).data];
});
"""
SHOWN = "return document.getElementById('task').dataset.shown ?? null"
CHOSEN = "return document.querySelector('[name=answer]:checked')?.value ?? null"


class Pairs:
    """What the tests do on the survey's page besides what they do on all pages for raters."""

    def wait_for_pair(self, last: str | None = None) -> str:
        """Waits until a pair other than `last` is in sight. Returns its token."""
        self.wait(lambda: self.run(SHOWN) not in (None, last))
        return self.run(SHOWN)

    def wait_for_pair_or_end(self, last: str) -> str | None:
        """Waits as `wait_for_pair`; None where no pair is left."""
        self.wait(lambda: self.run(SHOWN) not in (None, last) or self.find("#notice").is_displayed())
        return None if self.find("#notice").is_displayed() else self.run(SHOWN)

    def start(self, *screen) -> str:
        self.open(*screen)
        return self.wait_for_pair()


@pytest.fixture
def make_page(driver, start_server, make_site, rater_page):
    """Makes the page of a site. Servers stop after the page is left."""
    return functools.partial(type("Page", (Pairs, rater_page), {}), driver)


@pytest.fixture
def make_site(make, local_server):
    """Serves a survey in this process, with one rater."""
    sites = []

    def make_site(**settings):
        [store] = make(3, names="", **settings)
        site = local_server(make_app(store))
        site.store, site.secret = store, store.add_rater("Ann")
        sites.append(site)
        return site

    yield make_site
    for site in sites:
        site.stop()


@pytest.fixture
def page(make_page, make_site):
    return make_page(make_site(check_rate=0))


def given(page) -> list[int]:
    return [one.answer.answer for one in page.site.store.given()]


def test_keys_become_the_result(make, make_page, start_server, reds, capsys):
    """Two raters answer by keys, with a crash in between; the result is that of the keys."""
    store, ann, bob = make(6, ["Ann", "Bob"], raters=2, check_rate=0.2)
    secrets = [store.renew(person.name) for person in (ann, bob)]
    server = start_server("survey", store.folder)
    expected = {}
    for number, (person, secret) in enumerate(zip((ann, bob), secrets, strict=True)):
        page = make_page(types.SimpleNamespace(address=server.address, secret=secret))
        token = page.start()
        for turn in range(20):
            left, right = (reds[red] for red, *_ in page.run(PIXELS))
            prompt = page.find("#prompt").text
            # Ann prefers one generator, Bob mostly the other one; each in a way of their own.
            liked, value = ("tuned_7", 1 + turn % 2) if number == 0 else ("plain_1", 2 + turn % 2)
            value = 3 if left == right else value if left == liked else 6 - value
            page.type("5", str(value))
            if number == 1 and turn == 3:
                page.wait_until_saved()
                server.kill()
                server.start()
                page.reload()
                page.wait_for_pair()
                assert page.run(CHOSEN) == str(value)
            check = ""
            if left == right:
                check = "identical"
            elif (prompt, person.id, "") in expected:
                check = "swapped"
            assert (prompt, person.id, check) not in expected
            expected[prompt, person.id, check] = (left, right, value)
            page.type(Keys.ENTER)
            if not (token := page.wait_for_pair_or_end(token)):
                break
        # The browser logs that the server was away, if it noticed.
        page.driver.get_log("browser")
    answers = [
        Answer(prompt, prompt, f"rater-{person}", left, right, value, check)
        for (prompt, person, check), (left, right, value) in expected.items()
    ]
    assert sum(not answer.check for answer in answers) == 12
    survey.main(["result", str(store.folder), "--format=json"])
    found = json.loads(capsys.readouterr().out)
    wanted = json.loads(json.dumps(statistics.result(answers)))
    for result in (found, wanted):
        for row in result["by_prompt"]:
            del row["prompt_id"]
        result["by_prompt"].sort(key=lambda row: row["prompt"])
    assert found == wanted


def test_the_previous_answer_is_corrected(page):
    first = page.start()
    page.type("4", Keys.ENTER)
    second = page.wait_for_pair(first)
    # The choice on the open pair isn't lost meanwhile.
    page.type("2")
    page.wait_until_saved()
    page.type(Keys.BACKSPACE)
    assert page.wait_for_pair(second) == first
    assert page.find("#correcting").is_displayed()
    assert page.run(CHOSEN) == "4"
    page.type("1")
    page.wait_until_saved()
    assert given(page) == [1]
    page.type("5", Keys.ENTER)
    assert page.wait_for_pair(first) == second
    assert page.run(CHOSEN) == "2"
    assert not page.find("#correcting").is_displayed()
    page.find("[data-action=previous]").click()
    assert page.wait_for_pair(second) == first
    page.find(".primary").click()
    page.wait_for_pair(first)
    assert given(page) == [5]


def test_the_last_answer_of_all_is_corrected(page):
    token = page.start()
    for _ in range(3):
        page.type("2", Keys.ENTER)
        token = page.wait_for_pair_or_end(token)
    assert token is None
    assert page.find("#notice p").text == "Thank you! No pair is waiting for you now."
    page.find("#notice button:last-child").click()
    page.wait(lambda: page.find("#correcting").is_displayed() and page.run(CHOSEN) == "2")
    page.wait_for_pair()
    page.type("4", Keys.ENTER)
    page.wait(lambda: page.find("#notice").is_displayed())
    assert given(page) == [2, 2, 4]


def test_an_answer_is_needed_and_no_previous_pair_is_told(page):
    page.start()
    page.type(Keys.ENTER)
    assert page.find("#missing").text == "Please choose an answer."
    page.type(Keys.BACKSPACE)
    page.wait(lambda: page.find("#missing").text == "No pair was answered before.")
    # The browser itself logs the refusal.
    assert ["404" in line["message"] for line in page.driver.get_log("browser")] == [True]
    page.type("3")
    assert page.find("#missing").text == ""
    page.wait_until_saved()


def test_the_browser_keeps_what_the_server_cannot_save(page):
    page.start()
    page.site.stop()
    page.type("2")
    page.wait(lambda: "Not saved yet" in page.find("#saved").text)
    page.driver.get("about:blank")
    page.site.start()
    page.driver.get(page.site.address)
    token = page.wait_for_pair()
    page.wait_until_saved()
    assert page.run(CHOSEN) == "2"
    page.type(Keys.ENTER)
    page.wait_for_pair(token)
    assert given(page) == [2]
    page.driver.get_log("browser")


def test_two_tabs_never_overwrite_silently(page):
    token = page.start()
    person = page.site.store.person(page.site.secret)
    page.site.store.save(person, token, 0, 5, 1.0)
    page.type("1")
    page.wait(lambda: page.find("#conflict").is_displayed())
    page.find("#conflict [value=theirs]").click()
    page.wait_until_saved()
    assert page.run(CHOSEN) == "5"
    page.type(Keys.ENTER)
    page.wait_for_pair(token)
    assert given(page) == [5]
    assert ["409" in line["message"] for line in page.driver.get_log("browser")] == [True]


def test_skip_needs_a_reason(page):
    token = page.start()
    page.type("k")
    page.find("#leave .primary").click()
    assert page.find("#leave").is_displayed()
    page.type("hurts my eyes")
    page.find("#leave .primary").click()
    page.wait_for_pair(token)
    assert page.site.store.skips() == {1: 1}


def test_both_images_are_enlarged_at_the_same_place(page):
    page.start()
    width = "return ['left', 'right'].map((id) => document.getElementById(id).getBoundingClientRect().width)"
    before = page.run(width)
    page.type("z")
    assert page.run(width) == pytest.approx([2.5 * one for one in before])
    page.type("z")
    assert page.run(width) == before
    chain = ActionBuilder(page.driver, duration=0)
    chain.pointer_action.move_to(page.find("#right")).pointer_down()
    chain.perform()
    page.wait(lambda: page.run(width) == pytest.approx([2.5 * one for one in before]))
    chain = ActionBuilder(page.driver, duration=0)
    chain.pointer_action.pointer_up()
    chain.perform()
    assert page.run(width) == before
    page.type("?")
    assert page.find("#keys").is_displayed()
    # The dialog takes the keys while it is open.
    page.type("3", Keys.ESCAPE)
    assert page.run(CHOSEN) is None


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_shows_all_of_it_readably(page, theme):
    page.start(390, theme)
    page.type("3")
    page.wait_until_saved()
    assert page.run("return [document.documentElement.scrollWidth, innerWidth]") == [390, 390]
    left, right = (page.find(f"#{side}").rect for side in ("left", "right"))
    assert left["y"] + left["height"] < right["y"]
    assert left["x"] == right["x"]
    for contrast, text in page.driver.contrasts():
        assert contrast >= 4.5, text


def test_controls_have_names_for_screen_readers(page):
    page.start()
    controls = page.driver.find_elements("css selector", "#task :is(input, button, img)")
    names = [control.accessible_name for control in controls]
    assert len(names) == 11
    assert all(names)
    assert names[:2] == ["Image A", "Image B"]
    assert names[2:7] == [
        f"{value} {text}" for value, text in zip(ANSWERS, page.site.store.config.answers, strict=True)
    ]
