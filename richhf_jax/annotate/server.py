"""Serves the raters' page and the manager's page of a project, with its API; see `web`.

Prompts reach the browser as JSON or escaped.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from richhf_jax import errors, feedback
from richhf_jax.annotate import manage, suggestions, web
from richhf_jax.annotate.answers import InvalidAnswer, Suggestion
from richhf_jax.annotate.records import Conflict, Incomplete, Item, Person, Work
from richhf_jax.annotate.store import Store

NO_WORK = "Thank you! No image is waiting for you now."
ANSWER_FIELDS = {"revision": int, "answer": dict, "seconds": float}
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


def make_app(store: Store) -> ASGIApp:
    """Makes the app of a project's store."""
    server = Server(store)
    routes = [
        Route("/", server.rater_page),
        Route("/api/next", server.next),
        Route("/api/items/{item:path}/done", server.finish, methods=["POST"]),
        Route("/api/items/{item:path}/skip", server.skip, methods=["POST"]),
        Route("/api/items/{item:path}", server.save, methods=["PUT"]),
        Route("/image/{item:path}", server.image),
        Route("/manage", server.manage),
        Route("/manage/agreement", server.agreement),
        Route("/manage/items/{item:path}", server.manage_item),
        Route("/manage/image/{item:path}", server.manage_image),
        Route("/manage/heatmap/{kind}/{item:path}", server.heatmap),
        Route("/manage/deactivate", server.deactivate, methods=["POST"]),
        Route("/manage/exclude", server.exclude, methods=["POST"]),
        Route("/manage/include", server.include, methods=["POST"]),
        Route("/manage/reassign", server.reassign, methods=["POST"]),
    ]
    handlers = {
        Conflict: lambda request, error: web.conflict_reply(
            error, suggestion=server.suggestion(error.suggestion)
        ),
        Incomplete: lambda request, error: JSONResponse(
            {"error": f"Please answer: {', '.join(error.missing)}.", "missing": error.missing}, 422
        ),
        InvalidAnswer: lambda request, error: web.error_reply(400, f"The answer can't be saved: {error}."),
    }
    return server.app(routes, handlers)


class Server(web.Site):
    """The app's endpoints on one store."""

    def __init__(self, store: Store):
        super().__init__(store, "richhf_jax.annotate")
        self._store = store

    async def rater_page(self, request: Request) -> Response:
        """Returns the rater's page; its script gets the images."""
        person = await self.person(request)
        config = self._store.config
        values = {
            "title": config.title,
            "person": person.id,
            "radius": config.point_radius,
            "kinds": config.kinds,
            "words": config.words,
            "scales": config.scales,
            "guidelines": web.prose(config.guidelines),
            "shortcuts": SHORTCUTS,
        }
        return self.page(request, "annotate.html", values)

    async def next(self, request: Request) -> Response:
        """Returns the person's open image, or the next one, and how far they are."""
        person = await self.person(request)
        work = await run_in_threadpool(self._store.next_item, person)
        progress = await run_in_threadpool(self._store.progress, person)
        message = None if work else NO_WORK
        return JSONResponse(
            {
                "work": work and _work_json(work) | {"suggestion": self.suggestion(work.suggestion)},
                "progress": dataclasses.asdict(progress) | {"total_open": web.about(progress.total_open)},
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
        """Ends an image's answer; in the practice the reply holds the right answers.

        A first answer may be followed by a suggestion, which the reply holds, and another answer.
        """
        person, item, body = await self._write(request)
        found = await run_in_threadpool(
            self._store.finish, person, item, body["revision"], body["answer"], body["seconds"]
        )
        if found and "suggestion" in found:
            return JSONResponse(found | {"suggestion": self.suggestion(found["suggestion"])})
        return JSONResponse({"feedback": found and self._feedback(found)})

    def suggestion(self, suggestion: Suggestion | None) -> dict[str, Any] | None:
        """Returns what the script needs of a suggestion that its rater may see."""
        return None if suggestion is None else suggestions.for_page(suggestion, self._store.config)

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
        person = await self.person(request)
        return await run_in_threadpool(self._read_image, person, request.path_params["item"])

    def _read_image(self, person: Person, item: str) -> Response:
        return web.image(self._store.image_path(self._store.work(person, item).item))

    async def manage(self, request: Request) -> Response:
        """Returns the manager's page."""
        await self.person(request, is_manager=True)
        search = request.query_params.get("search", "")
        values = await run_in_threadpool(manage.overview, self._store, search)
        return self.page(request, "manage.html", values | {"shown": SHOWN})

    async def agreement(self, request: Request) -> Response:
        """Returns the page of the raters' agreement, which takes seconds for thousands of answers."""
        await self.person(request, is_manager=True)
        values = await run_in_threadpool(manage.agreement, self._store)
        return self.page(request, "agreement.html", values)

    async def manage_item(self, request: Request) -> Response:
        """Returns the page of one image's answers."""
        item = await self._any_item(request)
        values = await run_in_threadpool(manage.item_view, self._store, item)
        return self.page(request, "manage_item.html", values)

    async def manage_image(self, request: Request) -> Response:
        """Returns any image."""
        item = await self._any_item(request)
        return await run_in_threadpool(web.image, self._store.image_path(item))

    async def heatmap(self, request: Request) -> Response:
        """Returns the picture of an image's consolidated heatmap."""
        item, kind = await self._any_item(request), request.path_params["kind"]
        picture = kind in feedback.HEATMAPS and await run_in_threadpool(
            manage.heatmap, self._store, item, kind
        )
        if not picture:
            raise HTTPException(404, "Nothing is marked.")
        return Response(picture, media_type="image/png")

    async def deactivate(self, request: Request) -> Response:
        """Withdraws a rater's link; their answers stay."""
        await self.person(request, is_manager=True)
        form = await request.form(max_files=0)
        await run_in_threadpool(self._store.deactivate, web.number(form, "rater"))
        return RedirectResponse("/manage", 303)

    async def exclude(self, request: Request) -> Response:
        """Makes an answer not count, for a reason."""
        await self.person(request, is_manager=True)
        form = await request.form(max_files=0)
        return await self._decide(
            self._store.exclude, web.number(form, "answer"), str(form.get("reason", ""))
        )

    async def include(self, request: Request) -> Response:
        """Makes an excluded answer count."""
        await self.person(request, is_manager=True)
        return await self._decide(self._store.include, web.number(await request.form(max_files=0), "answer"))

    async def reassign(self, request: Request) -> Response:
        """Gives an image to the raters, or to the one that the form names."""
        await self.person(request, is_manager=True)
        form = await request.form(max_files=0)
        rater = web.number(form, "rater") if form.get("rater") else None
        return await self._decide(self._store.reassign, str(form.get("item", "")), rater)

    async def _decide(self, decide: Callable[..., str], *arguments: Any) -> Response:
        """Runs one of the manager's decisions, which returns the image's name, and shows the image again."""
        try:
            item = await run_in_threadpool(decide, *arguments)
        except KeyError:
            raise HTTPException(404, "There is no such answer.") from None
        except errors.UserError as error:
            raise HTTPException(400, str(error)) from None
        return RedirectResponse(f"/manage/items/{manage.path(item)}", 303)

    async def _any_item(self, request: Request) -> Item:
        """Returns the item of a manager's request."""
        await self.person(request, is_manager=True)
        item = await run_in_threadpool(self._store.item, request.path_params["item"])
        if item is None:
            raise HTTPException(404, "There is no such image.")
        return item

    async def _write(
        self, request: Request, fields: Mapping[str, type] = ANSWER_FIELDS
    ) -> tuple[Person, str, dict[str, Any]]:
        """Returns who writes, to which image, and the checked body."""
        person = await self.person(request)
        return person, request.path_params["item"], await web.body(request, fields)


def _work_json(work: Work) -> dict[str, Any]:
    """Returns what the script needs of an image; nothing that tells a gold item or its suggestion."""
    item = work.item
    return {
        "id": item.id,
        "image": f"/image/{manage.path(item.id)}",
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
