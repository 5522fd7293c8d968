"""Prepares text that others made (ids, file names, notes) for a place where parts of it would act as markup.

HTML isn't here: jinja2 escapes it in all templates.
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


def for_csv(cell: str) -> str:
    """Returns a cell that no spreadsheet runs as a formula: one that begins like it gets a ' in front.

    >>> for_csv("=1+1"), for_csv("-"), for_csv("a=1")
    ("'=1+1", "'-", 'a=1')
    """
    return f"'{cell}" if cell.startswith(_FORMULA) else cell
