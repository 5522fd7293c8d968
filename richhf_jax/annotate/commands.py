"""The commands that every site for raters has: their links, the server, a copy of the database."""

import argparse
import pathlib
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

from richhf_jax import errors, writing
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


def check_out(out: str, folder: pathlib.Path) -> None:
    """Checks that a file can be written, and is none of the files of a project or survey.

    Raises:
      errors.UserError: it can't, or it is.
    """
    place, own = pathlib.Path(out).resolve(), folder.resolve()
    if place == own or (place.exists() and own in place.parents) or own / "images" in place.parents:
        raise errors.UserError(f"{out} belongs to {folder}: name a file outside it")
    writing.check_file(out)


def raters(store: People, options: argparse.Namespace) -> int:
    """Adds raters, gives them new links, or deactivates them."""
    for name in options.names:
        if options.action == "deactivate":
            store.deactivate(store.rater(name).id)
            print(f"{for_terminal(name)}: the link is void")
        else:
            secret = store.add_rater(name) if options.action == "add" else store.renew(name)
            print(f"{for_terminal(name)}\t{options.url}/r/{secret}")
    return 0


def serve(app: Callable[..., Any], options: argparse.Namespace, folder: str) -> int:
    """Serves an app until it is interrupted; warns where everyone reaches it.

    Raises:
      errors.UserError: the address can't be used.
    """
    import uvicorn

    try:
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        listener = socket.create_server((options.host, options.port), family=family, backlog=2048)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]
        raise errors.UserError(
            f"can't serve at {options.host}, port {options.port}: {reason}. Give another --host or --port"
        ) from None
    if options.host not in ("127.0.0.1", "::1", "localhost"):
        print(_EXPOSED.format(port=options.port), file=sys.stderr)
    print(f"serving {folder} at http://{options.host}:{options.port}; Ctrl-C ends it", flush=True)
    # A log of requests would hold the secrets of the links.
    settings = uvicorn.Config(
        app, options.host, options.port, access_log=False, server_header=False, log_level="warning"
    )
    with listener:
        uvicorn.Server(settings).run(sockets=[listener])
    return 0


def backup(store: People, options: argparse.Namespace) -> int:
    """Copies the database while the server may run."""
    check_out(options.out, store.folder)
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
    one.add_argument("--port", type=number(65535), default=8080, help="default %(default)s")


def add_backup(command: Command, folder: str) -> None:
    """Adds the command `backup`."""
    one = command("backup", backup, "copy the database, also while the server runs")
    one.add_argument(folder.lower(), metavar=folder)
    one.add_argument("out", metavar="OUT.db", help="overwritten if it exists")


def add_url(parser: argparse.ArgumentParser) -> None:
    """Adds the flag --url."""
    parser.add_argument(
        "--url",
        type=_url,
        default="http://127.0.0.1:8080",
        help="where raters reach the server, for links; default %(default)s",
    )


def _url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"{text!r} doesn't begin with http:// or https://")
    return text.rstrip("/")


def number(most: int) -> Callable[[str], int]:
    """Returns what parses a flag's whole number, from 1 to `most`."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to {most}")
        return int(text)

    return parse
