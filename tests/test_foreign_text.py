import hypothesis
import pytest
from hypothesis import strategies

from richhf_jax import foreign_text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
        ("\x1b]52;c;ZXZpbA==\x07", r"\x1b]52;c;ZXZpbA==\x07"),
        ("ok\nroot: all fine", r"ok\nroot: all fine"),
        ("\x9b31m", r"\x9b31m"),
        ("a\u202egnp.exe", r"a\u202egnp.exe"),
        ("a\u2028b\ud800", r"a\u2028b\ud800"),
        ("naïve 猫 👩‍🚀", "naïve 猫 👩‍🚀"),
    ],
)
def test_what_acts_on_a_terminal_becomes_an_escape(text, shown):
    assert foreign_text.for_terminal(text) == shown


@hypothesis.given(strategies.text(strategies.characters()))
def test_any_text_becomes_one_printable_line(text):
    shown = foreign_text.for_terminal(text)
    assert len(shown.splitlines()) <= 1
    assert foreign_text.for_terminal(shown) == shown
    shown.encode()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<script>&amp;", "&lt;script&gt;&amp;amp;"),
        ("[x](javascript:alert(1))", r"\[x\]\(javascript\:alert\(1\)\)"),
        ("note\n\n## Licence", r"note\\n\\n\#\# Licence"),
        ("x | 1.0 |", r"x \| 1\.0 \|"),
    ],
)
def test_markdown_shows_markup_as_text(text, shown):
    assert foreign_text.for_markdown(text) == shown


def test_what_a_spreadsheet_may_run_is_known():
    assert all(map(foreign_text.is_formula, ("=1", "@x", "+1", "-1", "\t=1", "\r=1")))
    assert not any(map(foreign_text.is_formula, ("a=1", "'=1", " =1", "")))


def test_a_text_of_ours_keeps_its_line_breaks():
    assert foreign_text.lines_for_terminal("a\x1b[31m:\r\nb\u2028c") == "a\\x1b[31m:\\r\nb\\u2028c"
