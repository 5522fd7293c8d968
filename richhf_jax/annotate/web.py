"""What every page for raters needs: links, cookies, headers, limits and errors.

A person comes by a secret link, which sets a cookie; every request is checked against it. The browser gets
no inline script (a strict Content-Security-Policy), and the type of an image comes from its bytes. Errors are
{"error": text}, or a page where a person looks at it.
"""

import collections
import hashlib
import importlib.resources
import json
import pathlib
import sqlite3
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import markdown_it
import markupsafe
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from richhf_jax import errors
from richhf_jax.annotate import project
from richhf_jax.annotate.people import People
from richhf_jax.annotate.records import MAX_SECONDS, Conflict, NotYours, Person
from richhf_jax.inputs import containers

# Bytes of a request's body. The largest answer, with 1,000 points of a kind, is a tenth of it.
MAX_BODY = 1 << 20
# Wrong secrets that an address may send in a minute.
MAX_WRONG = 20
# A year: raters come back with the same browser.
COOKIE_SECONDS = 365 * 24 * 3600
# By whether the person is a manager.
HOME = {False: "/", True: "/manage"}
NO_LINK = "Open your personal link again. If it was withdrawn, ask who sent it to you."
# Raw HTML in a project's guidelines is shown as text.
_MARKDOWN = markdown_it.MarkdownIt("commonmark", {"html": False})
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    # The first address holds the secret, so no other site gets it. "no-referrer" would do the same, but then
    # browsers send forms with the Origin "null", which `Guard` refuses.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Attempts:
    """Counts the wrong secrets that each address sends in a minute.

    Secrets of 128 bits can't be guessed; the limit keeps who tries from keeping the server busy.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._minute = 0
        self._wrong: collections.Counter[str] = collections.Counter()
        # Hashes of the secrets that were right: one wrong person locks out nobody else at the address.
        self._right: set[bytes] = set()

    def person(self, people: People, address: str, secret: str) -> Person | None:
        """Returns whose secret it is; None where it is wrong or was withdrawn.

        Raises:
          HTTPException: 429, the address has sent MAX_WRONG wrong secrets in this minute.
        """
        if (minute := int(self._clock() // 60)) != self._minute:
            self._minute = minute
            self._wrong.clear()
        digest = hashlib.sha256(secret.encode()).digest()
        if self._wrong[address] >= MAX_WRONG and digest not in self._right:
            raise HTTPException(429, "Too many wrong links came from this address. Try again in a minute.")
        person = people.person(secret)
        if person is None or not person.active:
            self._right.discard(digest)
            self._wrong[address] += 1
            return None
        self._right.add(digest)
        return person


class Guard:
    """Wraps the whole app: sets every response's headers, and refuses writes that other sites' pages send.

    A connection whose request's body wasn't read to its end is closed.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request as ASGI wants it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        headers = Headers(scope=scope)
        has_more = "Transfer-Encoding" in headers or headers.get("Content-Length", "0") != "0"

        async def receive_body() -> Message:
            nonlocal has_more
            message = await receive()
            has_more = message.get("more_body", False)
            return message

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-store")
                if has_more:
                    # Else the server would read the rest, however long it is, to throw it away.
                    headers["Connection"] = "close"
            await send(message)

        # Browsers send an Origin with every write. Behind a proxy the scheme may differ, the host may not.
        origin = headers.get("Origin", "").partition("://")[2]
        if scope["method"] not in ("GET", "HEAD") and (not origin or origin != headers.get("Host")):
            response = JSONResponse({"error": "The request comes from another site's page."}, 403)
            return await response(scope, receive, send_with_headers)
        return await self._app(scope, receive_body, send_with_headers)


class Site:
    """A site for raters. Its people come by links, and its pages from templates.

    The store's calls wait for the disk, so they run in threads.
    """

    def __init__(self, people: People, package: str):
        """Makes a site; `package` has its folders `templates` and `static`, beside those of this package."""
        self._people = people
        self._packages = list(dict.fromkeys([package, "richhf_jax.annotate"]))
        self._attempts = Attempts()
        environment = jinja2.Environment(
            loader=jinja2.ChoiceLoader([jinja2.PackageLoader(name) for name in self._packages]),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.globals["site"] = people.site_id()
        self._templates = Jinja2Templates(env=environment)

    def app(self, routes: Sequence[BaseRoute], handlers: Mapping[Any, Any]) -> ASGIApp:
        """Makes the app of the site's own routes and handlers of errors, and of those that all sites have."""
        look = importlib.resources.files("richhf_jax.pages") / "templates/look.css"

        async def get_look(request: Request) -> Response:
            return FileResponse(str(look), media_type="text/css", headers={"Cache-Control": "no-cache"})

        common: dict[Any, Any] = {
            HTTPException: self._http_error,
            Conflict: lambda request, error: conflict_reply(error),
            NotYours: lambda request, error: error_reply(404, "This image is not open for you."),
            sqlite3.OperationalError: _storage_error,
            # A browser was closed, or lost its network. Nobody reads the reply.
            ClientDisconnect: lambda request, error: Response(status_code=400),
        }
        app = Starlette(
            routes=[
                Route("/r/{secret}", self._enter),
                Route("/m/{secret}", self._enter),
                *routes,
                Route("/static/look.css", get_look),
                Mount("/static", StaticFiles(packages=[(name, "static") for name in self._packages])),
            ],
            exception_handlers=common | dict(handlers),
            max_body_size=MAX_BODY,
        )
        return Guard(app)

    def page(self, request: Request, template: str, values: Mapping[str, Any], status: int = 200) -> Response:
        """Returns a page made of a template."""
        return self._templates.TemplateResponse(request, template, dict(values), status)

    async def person(self, request: Request, is_manager: bool = False) -> Person:
        """Returns who sends a request, by their cookie."""
        secret = request.cookies.get(_cookie(request, is_manager), "")
        person = secret and await run_in_threadpool(
            self._attempts.person, self._people, _address(request), secret
        )
        if not person or person.is_manager != is_manager:
            raise HTTPException(403, NO_LINK)
        return person

    async def _enter(self, request: Request) -> Response:
        """Turns the link's secret into a cookie, and goes on to the page."""
        secret = request.path_params["secret"]
        person = await run_in_threadpool(self._attempts.person, self._people, _address(request), secret)
        if not person:
            raise HTTPException(403, NO_LINK)
        # Not a redirect: coming from another site's link, the browser would follow it without the cookie.
        response = self._notice(request, "Welcome", "The page opens.", forward=HOME[person.is_manager])
        response.set_cookie(
            _cookie(request, person.is_manager), secret, COOKIE_SECONDS, path=HOME[person.is_manager],
            secure=request.url.scheme == "https", httponly=True, samesite="strict",
        )  # fmt: skip
        return response

    async def _http_error(self, request: Request, error: HTTPException) -> Response:
        """Returns an error as JSON to a script, or else as a page."""
        if request.url.path.startswith("/api/"):
            return error_reply(error.status_code, error.detail)
        return self._notice(request, "This page can't be shown", error.detail, error.status_code)

    def _notice(
        self, request: Request, title: str, text: str, status: int = 200, forward: str = ""
    ) -> Response:
        return self.page(request, "notice.html", {"title": title, "text": text, "forward": forward}, status)


async def body(request: Request, fields: Mapping[str, type]) -> dict[str, Any]:
    """Returns a request's body: a JSON object with fields of these types; `seconds` is 0 to MAX_SECONDS."""
    try:
        found = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise HTTPException(400, "The request's body must be JSON.") from None
    for name, kind in fields.items():
        kinds = (float, int) if kind is float else (kind,)
        if not isinstance(found, dict) or type(found.get(name)) not in kinds:
            raise HTTPException(400, f"The request's {name!r} must be of type {kind.__name__}.")
    if not 0 <= found.get("seconds", 0) <= MAX_SECONDS:
        raise HTTPException(400, f"The request's 'seconds' must be 0 to {MAX_SECONDS}.")
    return found


def number(form: FormData, name: str) -> int:
    """Returns a whole number of a form."""
    value = str(form.get(name, ""))
    if not (value.isascii() and value.isdecimal() and len(value) < 16):
        raise HTTPException(400, f"The form's {name!r} must be a number.")
    return int(value)


def image(path: pathlib.Path) -> Response:
    """Returns an image. Its bytes alone say of which type it is."""
    try:
        data = project.read_image(path)
    except errors.UserError as error:
        print(error, file=sys.stderr)  # For who serves the page; raters learn no paths.
        told = "The image is missing or has changed. Please tell who sent you the link."
        raise HTTPException(404, told) from None
    try:
        form = containers.read(data).format
    except containers.ImageError as error:
        raise HTTPException(404, f"The file is no image: {error}") from None
    headers = {"Cache-Control": "private, max-age=86400"}
    return Response(data, media_type=f"image/{form.lower()}", headers=headers)


def prose(markdown: str) -> markupsafe.Markup:
    """Renders Markdown for a page; HTML in it is shown as text."""
    return markupsafe.Markup(_MARKDOWN.render(markdown))


def about(count: int) -> int:
    """Rounds up to tens, or to two digits. By the number itself raters could tell what tests them.

    >>> about(0), about(3), about(30), about(1204)
    (0, 10, 30, 1300)
    """
    step = 10 ** max(1, len(str(count)) - 2)
    return -(-count // step) * step


def conflict_reply(error: Conflict, **more: Any) -> Response:
    """Returns what the server has where another tab was first, and `more` fields, as JSON."""
    told = {"error": "Another tab has changed it.", "revision": error.revision, "answer": error.answer}
    return JSONResponse(told | more, 409)


def error_reply(status: int, text: str) -> Response:
    """Returns an error as JSON."""
    return JSONResponse({"error": text}, status)


def _cookie(request: Request, is_manager: bool) -> str:
    """Returns the cookie's name. Browsers share cookies between a host's ports, where other sites may be."""
    return f"{'manager' if is_manager else 'rater'}{request.url.port or ''}"


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


def _storage_error(request: Request, error: sqlite3.OperationalError) -> Response:
    if "full" in str(error):
        return error_reply(507, "The server's disk is full. Please tell who sent you the link.")
    return error_reply(503, "The server can't save now.")
