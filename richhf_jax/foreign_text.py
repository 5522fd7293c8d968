"""Prepares text that others made (ids, file names, notes) for a place where parts of it would act as markup.

HTML isn't here: jinja2 escapes it in all templates. `is_blank` tells whether there is text at all.
"""

import html
import re
import unicodedata

# Line breaks, and what reorders or hides text (bidirectional controls, zero-width characters).
_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")
# Joins emoji and letters of some scripts; alone it does nothing.
_HARMLESS = "\u200c\u200d"
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|~:])")
# First characters of a cell that a spreadsheet takes for a formula (https://owasp.org/www-community/attacks/CSV_Injection).
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def for_terminal(text: str) -> str:
    r"""Returns one line without control characters: these become escapes, as in Python.

    >>> for_terminal("a\x1b]0;title\x07\nb")
    'a\\x1b]0;title\\x07\\nb'
    """
    return "".join(_escaped(c) if _controls(c) else c for c in text)


def excerpt(text: str) -> str:
    """Returns the beginning of a text for a message, at most 60 characters, as `for_terminal` returns it."""
    text = for_terminal(text)
    return text if len(text) <= 60 else text[:57] + "..."


def lines_for_terminal(text: str) -> str:
    r"""Returns a text of ours with its line breaks, each line as `for_terminal` returns it.

    Parts that others made need `for_terminal` before, because their line breaks would stay.

    >>> lines_for_terminal("a\x1b[31m\nb")
    'a\\x1b[31m\nb'
    """
    return "\n".join(map(for_terminal, text.split("\n")))


def _controls(character: str) -> bool:
    return character not in _HARMLESS and unicodedata.category(character) in _CATEGORIES


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()


def for_markdown(text: str) -> str:
    r"""Returns one line that Markdown shows as it is.

    >>> for_markdown("# [x](javascript:alert) | <b>")
    '\\# \\[x\\]\\(javascript\\:alert\\) \\| &lt;b&gt;'
    """
    return _MARKDOWN.sub(r"\\\1", html.escape(for_terminal(text), quote=False))


def is_blank(text: str) -> bool:
    r"""Returns whether a text, such as a prompt, shows nothing: it has only spaces, or zero-width characters.

    >>> is_blank(" \u200b\ufeff"), is_blank("a\u200b")
    (True, False)
    """
    return all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in text)


def is_formula(cell: str) -> bool:
    """Returns whether a spreadsheet that opens a CSV file may run this cell.

    No CSV syntax forbids that: quotes don't. A ' in front would, but programs would then read another cell.

    >>> is_formula("=1+1"), is_formula("-"), is_formula("a=1")
    (True, True, False)
    """
    return cell.startswith(_FORMULA)
