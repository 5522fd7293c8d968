"""Serves the page of a survey's raters, with its API; see `annotate.web`.

Nothing that a browser gets tells the generators: a pair is named by a random token, and an image by the
token and its side.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from richhf_jax.annotate import web
from richhf_jax.annotate.records import NotYours, Person
from richhf_jax.survey.answers import AnswerError
from richhf_jax.survey.store import Store, Work

NO_WORK = "Thank you! No pair is waiting for you now."
NO_PREVIOUS = "No pair was answered before."
ANSWER_FIELDS = {"revision": int, "answer": int, "seconds": float}
SHORTCUTS = (
    (("Enter",), "done, next pair"),
    (("Backspace",), "back to the previous pair, to correct it"),
    (("z",), "enlarge both images, or fit them; the mouse moves what is seen"),
    (("k",), "skip the pair"),
    (("g", "?"), "show the guidelines; show these keys"),
)


def make_app(store: Store) -> ASGIApp:
    """Makes the app of a survey's store."""
    server = Server(store)
    routes = [
        Route("/", server.rater_page),
        Route("/api/next", server.next),
        Route("/api/previous", server.previous),
        Route("/api/pairs/{pair}/done", server.finish, methods=["POST"]),
        Route("/api/pairs/{pair}/skip", server.skip, methods=["POST"]),
        Route("/api/pairs/{pair}", server.save, methods=["PUT"]),
        Route("/image/{pair}/{side}", server.image),
    ]
    wrong = {AnswerError: lambda request, error: web.error_reply(400, f"The answer can't be saved: {error}.")}
    return server.app(routes, wrong)


class Server(web.Site):
    """The app's endpoints on one store."""

    def __init__(self, store: Store):
        super().__init__(store, "richhf_jax.survey")
        self._store = store

    async def rater_page(self, request: Request) -> Response:
        """Returns the rater's page; its script gets the pairs."""
        person = await self.person(request)
        config = self._store.config
        values = {
            "title": config.title,
            "person": person.id,
            "question": config.question,
            "answers": config.answers,
            "guidelines": web.prose(config.guidelines),
            "shortcuts": [(("1", "…", "5"), f"{config.answers[0]} … {config.answers[-1]}"), *SHORTCUTS],
        }
        return self.page(request, "survey.html", values)

    async def next(self, request: Request) -> Response:
        """Returns the person's open pair, or the next one, and how far they are."""
        person = await self.person(request)
        work = await run_in_threadpool(self._store.next_pair, person)
        return await self._shown(person, work, None if work else NO_WORK)

    async def previous(self, request: Request) -> Response:
        """Returns the pair that the person answered last."""
        person = await self.person(request)
        try:
            work = await run_in_threadpool(self._store.previous, person)
        except NotYours:
            raise HTTPException(404, NO_PREVIOUS) from None
        return await self._shown(person, work, None)

    async def _shown(self, person: Person, work: Work | None, message: str | None) -> Response:
        done, left = await run_in_threadpool(self._store.progress, person)
        progress = {"done": done, "left": web.about(left)}
        shown = work and dataclasses.asdict(work)
        return JSONResponse({"work": shown, "progress": progress, "message": message})

    async def save(self, request: Request) -> Response:
        """Saves an answer and returns its revision."""
        person, pair, body = await self._write(request)
        revision = await run_in_threadpool(
            self._store.save, person, pair, body["revision"], body["answer"], body["seconds"]
        )
        return JSONResponse({"revision": revision})

    async def finish(self, request: Request) -> Response:
        """Ends the work on a pair."""
        person, pair, body = await self._write(request)
        await run_in_threadpool(
            self._store.finish, person, pair, body["revision"], body["answer"], body["seconds"]
        )
        return JSONResponse({})

    async def skip(self, request: Request) -> Response:
        """Leaves a pair without an answer, for a reason."""
        person, pair, body = await self._write(request, {"revision": int, "reason": str})
        await run_in_threadpool(self._store.skip, person, pair, body["revision"], body["reason"])
        return JSONResponse({})

    async def image(self, request: Request) -> Response:
        """Returns the left or right image of a pair that was given to the person."""
        person = await self.person(request)
        pair, side = request.path_params["pair"], request.path_params["side"]
        if side not in ("left", "right"):
            raise NotYours
        path = await run_in_threadpool(self._store.image_path, person, pair, side)
        return await run_in_threadpool(web.image, path)

    async def _write(
        self, request: Request, fields: Mapping[str, type] = ANSWER_FIELDS
    ) -> tuple[Person, str, dict[str, Any]]:
        """Returns who writes, to which pair, and the checked body."""
        person = await self.person(request)
        return person, request.path_params["pair"], await web.body(request, fields)
