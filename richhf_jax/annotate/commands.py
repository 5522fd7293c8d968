"""The commands that every site for raters has: their links, the server, a copy of the database."""

import argparse
import pathlib
import sys
from collections.abc import Callable, Sequence

from richhf_jax import writing
from richhf_jax.annotate.people import People
from richhf_jax.annotate.settings import CONFIG, GUIDELINES
from richhf_jax.foreign_text import for_terminal

SOME_FAILED = 3
SHOWN_FAILURES = 10
_EXPOSED = """\
warning: every computer that reaches this one can open the page at port {port}, and links and answers travel
unencrypted. Outside a network that you trust, serve at 127.0.0.1 and put a proxy with TLS before it, such as
`caddy reverse-proxy --from annotate.example.org --to 127.0.0.1:{port}`."""

# Adds a command's parser: its name, the function that runs it, and what it does.
Command = Callable[[str, Callable[..., int], str], argparse.ArgumentParser]


def told_failures(failures: Sequence[str]) -> int:
    """Prints what was left out. Returns the exit code."""
    for line in failures[:SHOWN_FAILURES]:
        print(f"left out: {line}", file=sys.stderr)
    if len(failures) > SHOWN_FAILURES:
        print(f"left out: {len(failures) - SHOWN_FAILURES:,} others", file=sys.stderr)
    return SOME_FAILED if failures else 0


def raters(store: People, options: argparse.Namespace) -> int:
    """Adds raters, gives them new links, or deactivates them."""
    for name in options.names:
        if options.action == "deactivate":
            store.deactivate(store.rater(name).id)
        else:
            secret = store.add_rater(name) if options.action == "add" else store.renew(name)
            print(f"{for_terminal(name)}\t{options.url}/r/{secret}")
    return 0


def announce(options: argparse.Namespace, folder: str) -> None:
    """Prints where the page is served, and warns where everyone reaches it."""
    if options.host not in ("127.0.0.1", "::1", "localhost"):
        print(_EXPOSED.format(port=options.port), file=sys.stderr)
    print(f"serving {folder} at http://{options.host}:{options.port}; Ctrl-C ends it")


def backup(store: People, options: argparse.Namespace) -> int:
    """Copies the database while the server may run."""
    writing.check_file(options.out)
    with writing.explained_disk_errors(options.out):
        store.backup(pathlib.Path(options.out))
    print(f"{options.out}: the database; it holds neither {CONFIG} and {GUIDELINES} nor images/")
    return 0


def add_raters(command: Command, folder: str) -> None:
    """Adds the command `raters`; `folder` is the placeholder of its first argument."""
    one = command("raters", raters, "add raters, give them new links, deactivate them")
    one.add_argument("action", choices=("add", "renew", "deactivate"))
    one.add_argument(folder.lower(), metavar=folder)
    one.add_argument("names", nargs="+", metavar="NAME")
    add_url(one)


def add_serve(command: Command, folder: str, serve: Callable[..., int]) -> None:
    """Adds the command `serve`."""
    one = command("serve", serve, "serve the page")
    one.add_argument(folder.lower(), metavar=folder)
    one.add_argument("--host", default="127.0.0.1", help="address to serve at; default %(default)s")
    one.add_argument("--port", type=int, default=8080, help="default %(default)s")


def add_backup(command: Command, folder: str) -> None:
    """Adds the command `backup`."""
    one = command("backup", backup, "copy the database, also while the server runs")
    one.add_argument(folder.lower(), metavar=folder)
    one.add_argument("out", metavar="OUT.db", help="overwritten if it exists")


def add_url(parser: argparse.ArgumentParser) -> None:
    """Adds the flag --url."""
    parser.add_argument(
        "--url",
        type=lambda text: text.rstrip("/"),
        default="http://127.0.0.1:8080",
        help="where raters reach the server, for links; default %(default)s",
    )


def number(most: int) -> Callable[[str], int]:
    """Returns what parses a flag's whole number, from 1 to `most`."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to {most}")
        return int(text)

    return parse
