"""Serves the raters' page and the manager's page of a project, with its API.

A person comes by a secret link, which sets a cookie; every request is checked against it. The browser gets
no inline script (a strict Content-Security-Policy), prompts reach it as JSON or escaped, and the type of an
image comes from its bytes. Errors are {"error": text}, or a page where a person looks at it.
"""

import collections
import dataclasses
import hashlib
import importlib.resources
import json
import math
import re
import sqlite3
import time
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import markdown_it
import markupsafe
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from richhf_jax import errors, feedback
from richhf_jax.annotate import manage
from richhf_jax.annotate.answers import InvalidAnswer
from richhf_jax.annotate.records import Conflict, Incomplete, Item, NotYours, Person, Work
from richhf_jax.annotate.store import Store
from richhf_jax.inputs import containers

# Bytes of a request's body. The largest answer, with 1,000 points of a kind, is a tenth of it.
MAX_BODY = 1 << 20
# Wrong secrets that an address may send in a minute.
MAX_WRONG = 20
# A year: raters come back with the same browser.
COOKIE_SECONDS = 365 * 24 * 3600
# By whether the person is a manager: one browser may hold both links.
COOKIE = {False: "rater", True: "manager"}
HOME = {False: "/", True: "/manage"}
NO_LINK = "Open your personal link again. If it was withdrawn, ask who sent it to you."
NO_WORK = "Thank you! No image is waiting for you now."
# Raw HTML in a project's guidelines is shown as text.
MARKDOWN = markdown_it.MarkdownIt("commonmark", {"html": False})
ANSWER_FIELDS = {"revision": int, "answer": dict, "seconds": float}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    # The first address holds the secret.
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
# Images that the manager's page lists.
SHOWN = 500
SHORTCUTS = (
    (("i", "m"), "mark implausible or misaligned points"),
    (("arrows",), "move the cursor on the image, or the point that has the focus; with Shift by one pixel"),
    (("Space",), "mark the cursor's place, or remove the point there"),
    (("Backspace",), "remove the last point, or the one that has the focus"),
    (("w",), "go to the words; arrows move, Space chooses"),
    (("n",), "nothing is wrong wherever nothing is marked"),
    (("I", "M", "W"), "nothing is wrong in this part alone"),
    (("1", "…", "5"), "answer the next scale, or the one that has the focus"),
    (("s",), "go to the next scale"),
    (("c",), "write a comment; Esc leaves it"),
    (("Enter",), "done, next image (in a comment: Ctrl+Enter)"),
    (("z", "y"), "undo, redo (also with Ctrl)"),
    (("+", "-", "0"), "zoom in, zoom out, fit; drag the image to move it"),
    (("h",), "hide the points, or show them"),
    (("k", "b"), "skip the image; say that it is broken"),
    (("g", "?"), "show the guidelines; show these keys"),
)


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

    def person(self, store: Store, address: str, secret: str) -> Person | None:
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
        person = store.person(secret)
        if person is None or not person.active:
            self._right.discard(digest)
            self._wrong[address] += 1
            return None
        self._right.add(digest)
        return person


class Guard:
    """Wraps the app: sets the headers of every response, and refuses writes that other sites' pages send."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request as ASGI wants it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        headers = Headers(scope=scope)
        # Browsers send an Origin with every write. Behind a proxy the scheme may differ, the host may not.
        origin = headers.get("Origin", "").partition("://")[2]
        if scope["method"] not in ("GET", "HEAD") and (not origin or origin != headers.get("Host")):
            response = JSONResponse({"error": "The request comes from another site's page."}, 403)
            return await response(scope, receive, send_with_headers)
        return await self._app(scope, receive, send_with_headers)


def make_app(store: Store) -> Starlette:
    """Makes the app of a project's store."""
    server = Server(store)
    look = importlib.resources.files("richhf_jax.pages") / "templates/look.css"

    async def get_look(request: Request) -> Response:
        return FileResponse(str(look), media_type="text/css", headers={"Cache-Control": "no-cache"})

    routes = [
        Route("/r/{secret}", server.enter),
        Route("/m/{secret}", server.enter),
        Route("/", server.page),
        Route("/api/next", server.next),
        Route("/api/items/{item:path}/done", server.finish, methods=["POST"]),
        Route("/api/items/{item:path}/skip", server.skip, methods=["POST"]),
        Route("/api/items/{item:path}", server.save, methods=["PUT"]),
        Route("/image/{item:path}", server.image),
        Route("/manage", server.manage),
        Route("/manage/agreement", server.agreement),
        Route("/manage/items/{item:path}", server.manage_item),
        Route("/manage/image/{item:path}", server.manage_image),
        Route("/manage/deactivate", server.deactivate, methods=["POST"]),
        Route("/manage/exclude", server.exclude, methods=["POST"]),
        Route("/manage/reassign", server.reassign, methods=["POST"]),
        Route("/static/look.css", get_look),
        Mount("/static", StaticFiles(packages=[("richhf_jax.annotate", "static")])),
    ]
    # Starlette's type for handlers takes no function of one kind of error.
    handlers: dict[Any, Any] = {
        HTTPException: server.http_error,
        NotYours: lambda request, error: _error(request, 404, "This image is not open for you."),
        Conflict: lambda request, error: JSONResponse(
            {"error": "Another tab has changed it.", "revision": error.revision, "answer": error.answer}, 409
        ),
        Incomplete: lambda request, error: JSONResponse(
            {"error": f"Please answer: {', '.join(error.missing)}.", "missing": error.missing}, 422
        ),
        InvalidAnswer: lambda request, error: _error(request, 400, f"The answer can't be saved: {error}."),
        sqlite3.OperationalError: _storage_error,
    }
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard)],
        exception_handlers=handlers,
        max_body_size=MAX_BODY,
    )


class Server:
    """The app's endpoints on one store. The store's calls wait for the disk, so they run in threads."""

    def __init__(self, store: Store):
        self._store = store
        self._attempts = Attempts()
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("richhf_jax.annotate"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates = Jinja2Templates(env=environment)

    async def enter(self, request: Request) -> Response:
        """Turns the link's secret into a cookie, and goes on to the page."""
        secret = request.path_params["secret"]
        person = await run_in_threadpool(self._attempts.person, self._store, _address(request), secret)
        if not person:
            raise HTTPException(403, NO_LINK)
        # Not a redirect: coming from another site's link, the browser would follow it without the cookie.
        response = self._notice(request, "Welcome", "The page opens.", forward=HOME[person.is_manager])
        response.set_cookie(
            COOKIE[person.is_manager], secret, COOKIE_SECONDS, path=HOME[person.is_manager],
            secure=request.url.scheme == "https", httponly=True, samesite="strict",
        )  # fmt: skip
        return response

    async def page(self, request: Request) -> Response:
        """Returns the rater's page; its script gets the images."""
        person = await self._person(request)
        config = self._store.config
        values = {
            "title": config.title,
            "person": person.id,
            "radius": config.point_radius,
            "kinds": config.kinds,
            "words": config.words,
            "scales": config.scales,
            "guidelines": markupsafe.Markup(MARKDOWN.render(config.guidelines)),
            "shortcuts": SHORTCUTS,
        }
        return self._templates.TemplateResponse(request, "annotate.html", values)

    async def next(self, request: Request) -> Response:
        """Returns the person's open image, or the next one, and how far they are."""
        person = await self._person(request)
        work = await run_in_threadpool(self._store.next_item, person)
        progress = await run_in_threadpool(self._store.progress, person)
        message = None if work else NO_WORK
        return JSONResponse(
            {
                "work": work and _work_json(work),
                "progress": dataclasses.asdict(progress),
                "message": message,
            }
        )

    async def save(self, request: Request) -> Response:
        """Saves a draft and returns its revision."""
        person, item, body = await self._write(request)
        revision = await run_in_threadpool(
            self._store.save, person, item, body["revision"], body["answer"], body["seconds"]
        )
        return JSONResponse({"revision": revision})

    async def finish(self, request: Request) -> Response:
        """Ends an image's answer; in the practice the reply holds the right answers."""
        person, item, body = await self._write(request)
        found = await run_in_threadpool(
            self._store.finish, person, item, body["revision"], body["answer"], body["seconds"]
        )
        return JSONResponse({"feedback": found and self._feedback(found)})

    def _feedback(self, found: Mapping[str, Any]) -> dict[str, Any]:
        lines = [f"Your answer is {found['score']:.0%} like ours."]
        if found["passed"] is None:
            lines.append(f"Practice images left: {found['left']}.")
        elif found["passed"]:
            lines.append("You have passed the practice. From now on your answers count.")
        else:
            needed = self._store.config.calibration_threshold
            lines.append(f"The practice begins again: on average, answers must be {needed:.0%} like ours.")
        return {"lines": lines, "gold": found["answer"]}

    async def skip(self, request: Request) -> Response:
        """Leaves an image without an answer, for a reason."""
        person, item, body = await self._write(request, {"revision": int, "reason": str, "broken": bool})
        await run_in_threadpool(
            self._store.skip, person, item, body["revision"], body["reason"], body["broken"]
        )
        return JSONResponse({})

    async def image(self, request: Request) -> Response:
        """Returns an image that was given to the person."""
        person = await self._person(request)
        return await run_in_threadpool(self._read_image, person, request.path_params["item"])

    def _read_image(self, person: Person, item: str) -> Response:
        return self._show(self._store.work(person, item).item)

    def _show(self, item: Item) -> Response:
        data = self._store.image_path(item).read_bytes()
        try:
            form = containers.read(data).format
        except containers.ImageError as error:
            raise HTTPException(404, f"The file is no image: {error}") from None
        headers = {"Cache-Control": "private, max-age=86400"}
        return Response(data, media_type=f"image/{form.lower()}", headers=headers)

    async def manage(self, request: Request) -> Response:
        """Returns the manager's page."""
        await self._person(request, is_manager=True)
        values = await run_in_threadpool(manage.overview, self._store)
        return self._templates.TemplateResponse(request, "manage.html", values | {"shown": SHOWN})

    async def agreement(self, request: Request) -> Response:
        """Returns the page of the raters' agreement, which takes seconds for thousands of answers."""
        await self._person(request, is_manager=True)
        try:
            values = await run_in_threadpool(manage.agreement, self._store)
        except errors.UserError as error:
            raise HTTPException(400, str(error)) from None
        return self._templates.TemplateResponse(request, "agreement.html", values)

    async def manage_item(self, request: Request) -> Response:
        """Returns the page of one image's answers."""
        item = await self._any_item(request)
        values = await run_in_threadpool(manage.item_view, self._store, item)
        return self._templates.TemplateResponse(request, "manage_item.html", values)

    async def manage_image(self, request: Request) -> Response:
        """Returns any image."""
        item = await self._any_item(request)
        return await run_in_threadpool(self._show, item)

    async def deactivate(self, request: Request) -> Response:
        """Withdraws a rater's link; their answers stay."""
        await self._person(request, is_manager=True)
        form = await request.form()
        await run_in_threadpool(self._store.deactivate, _number(form, "rater"))
        return RedirectResponse("/manage", 303)

    async def exclude(self, request: Request) -> Response:
        """Makes an answer not count, for a reason."""
        await self._person(request, is_manager=True)
        form = await request.form()
        try:
            await run_in_threadpool(self._store.exclude, _number(form, "answer"), str(form.get("reason", "")))
        except KeyError:
            raise HTTPException(404, "There is no such answer.") from None
        return RedirectResponse("/manage", 303)

    async def http_error(self, request: Request, error: HTTPException) -> Response:
        """Returns an error as JSON to a script, or else as a page."""
        if request.url.path.startswith("/api/"):
            return JSONResponse({"error": error.detail}, error.status_code)
        return self._notice(request, "This page can't be shown", error.detail, error.status_code)

    def _notice(
        self, request: Request, title: str, text: str, status: int = 200, forward: str = ""
    ) -> Response:
        values = {"title": title, "text": text, "forward": forward}
        return self._templates.TemplateResponse(request, "notice.html", values, status)

    async def _person(self, request: Request, is_manager: bool = False) -> Person:
        """Returns who sends a request, by their cookie."""
        secret = request.cookies.get(COOKIE[is_manager], "")
        person = secret and await run_in_threadpool(
            self._attempts.person, self._store, _address(request), secret
        )
        if not person or person.is_manager != is_manager:
            raise HTTPException(403, NO_LINK)
        return person

    async def reassign(self, request: Request) -> Response:
        """Gives an image that was skipped back to the raters."""
        await self._person(request, is_manager=True)
        item = str((await request.form()).get("item", ""))
        try:
            await run_in_threadpool(self._store.reassign, item)
        except errors.UserError as error:
            raise HTTPException(400, str(error)) from None
        return RedirectResponse("/manage", 303)

    async def _any_item(self, request: Request) -> Item:
        """Returns the item of a manager's request."""
        await self._person(request, is_manager=True)
        item = await run_in_threadpool(self._store.item, request.path_params["item"])
        if item is None:
            raise HTTPException(404, "There is no such image.")
        return item

    async def _write(
        self, request: Request, fields: Mapping[str, type] = ANSWER_FIELDS
    ) -> tuple[Person, str, dict[str, Any]]:
        """Returns who writes, to which image, and the checked body."""
        person = await self._person(request)
        try:
            body = json.loads(await request.body())
        except (ValueError, RecursionError):
            raise HTTPException(400, "The request's body must be JSON.") from None
        for name, kind in fields.items():
            if not isinstance(body, dict) or type(body.get(name)) not in (
                kind,
                int if kind is float else kind,
            ):
                raise HTTPException(400, f"The request's {name!r} must be of type {kind.__name__}.")
        if not 0 <= body.get("seconds", 0) < math.inf:
            raise HTTPException(400, "The request's 'seconds' must be a positive number.")
        return person, request.path_params["item"], body


def serve(store: Store, host: str, port: int) -> None:
    """Serves a project until it is interrupted."""
    # A log of requests would hold the secrets of the links.
    uvicorn.run(
        make_app(store), host=host, port=port, access_log=False, server_header=False, log_level="warning"
    )


def _work_json(work: Work) -> dict[str, Any]:
    """Returns what the script needs of an image; nothing that tells a gold item."""
    item = work.item
    return {
        "id": item.id,
        "image": f"/image/{urllib.parse.quote(item.id, safe='')}",
        "width": item.width,
        "height": item.height,
        "pieces": _pieces(item.prompt),
        "answer": work.answer,
        "revision": work.revision,
        "is_calibration": work.is_calibration,
        "seconds": work.seconds,
    }


def _pieces(prompt: str) -> list[tuple[str, bool]]:
    """Splits a prompt into its tokens and what is between them.

    >>> _pieces('a cat, happy')
    [('a', True), (' ', False), ('cat', True), (', ', False), ('happy', True)]
    """
    pieces = re.split(f"({feedback.SEPARATORS.pattern})", prompt)
    return [(text, not index % 2) for index, text in enumerate(pieces) if text]


def _number(form: FormData, name: str) -> int:
    value = str(form.get(name, ""))
    if not (value.isascii() and value.isdecimal() and len(value) < 16):
        raise HTTPException(400, f"The form's {name!r} must be a number.")
    return int(value)


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


def _error(request: Request, status: int, text: str) -> Response:
    return JSONResponse({"error": text}, status)


def _storage_error(request: Request, error: sqlite3.OperationalError) -> Response:
    if "full" in str(error):
        return _error(request, 507, "The server's disk is full. Please tell who sent you the link.")
    return _error(request, 503, "The server can't save now.")
