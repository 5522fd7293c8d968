"""Lets raters work at once on the annotation server, and kills it at random moments.

It makes a project whose images are all one small PNG, and serves it by `python -m richhf_jax.annotate serve`.
Each rater is a thread that does what the page does: it gets the next image, saves its answer after each of
two parts and ends it, or skips the image. It sends the same again until the server replies. Nobody pauses, so
the server is as busy as it can be.

The server is killed by SIGKILL and started again. After each kill, and at the end, the database must have all
that the server has acknowledged; what it lacks is counted as lost. In the end each image must have exactly
the wanted answers, but for those that two raters skipped.

Times are those of requests that got a reply, with the client's part. They depend on the machine; look at
`growth`, the median of the last tenth of the run over that of the first, and at the counts.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import pathlib
import random
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm
from PIL import Image

from richhf_jax import errors, feedback, writing
from richhf_jax.annotate import project
from richhf_jax.annotate.records import Item
from richhf_jax.annotate.store import Store
from richhf_jax.benchmarks import json_file

HOST = "127.0.0.1"
IMAGE, SIDE = "image.png", 64
WORDS = ("a", "red", "cat", "on", "the", "table", "with", "two", "happy", "dogs", "at", "night")
SKIPPED = 0.01
# Seconds between two tries to reach the server.
WAIT = 0.05
# Seconds in which a server must start.
PATIENCE = 60
# Kills come while the first nine tenths of the answers are given.
LAST_KILL = 0.9
KINDS = ("next", "image", "save", "done", "skip")


@dataclasses.dataclass(frozen=True)
class Acknowledged:
    """What the server said it has of a rater's work on an item."""

    revision: int
    state: str
    answer: Mapping[str, Any]


class Server:
    """The server of a project in a process of its own. `closed` is set when it won't start again."""

    def __init__(self, folder: pathlib.Path):
        self._folder, self.closed = folder, threading.Event()
        with socket.create_server((HOST, 0)) as free:
            self.port = free.getsockname()[1]
        self.start()

    def start(self) -> None:
        """Starts the server and waits until it can be reached.

        Raises:
          errors.UserError: it doesn't start.
        """
        command = [sys.executable, "-m", "richhf_jax.annotate", "serve", str(self._folder)]
        self._process = subprocess.Popen([*command, f"--port={self.port}"], stdout=subprocess.DEVNULL)
        end = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), 1):
                return
            if self._process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise errors.UserError("the server doesn't start: see its message above")
            time.sleep(WAIT)

    def kill(self) -> None:
        """Kills the server by SIGKILL."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Kills the server for good."""
        self.closed.set()
        self.kill()


class Rater:
    """A rater who works like the page, without pauses."""

    def __init__(self, name: str, secret: str, server: Server, image: bytes, seed: int):
        self.name, self._image, self._closed = name, image, server.closed
        self._random = random.Random(f"{seed} {name}")
        self._connection = http.client.HTTPConnection(HOST, server.port, timeout=PATIENCE)
        self._headers = {
            "Cookie": f"rater{server.port}={secret}",
            "Origin": f"http://{HOST}:{server.port}",
        }
        # An item's id -> what the database must have of it.
        self.acknowledged: dict[str, Acknowledged] = {}
        # A request's kind -> (when it was answered, seconds that it took).
        self.times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
        self.tries_again = 0

    def work(self) -> int:
        """Rates until no image is left. Returns how many this rater got."""
        count = 0
        with contextlib.closing(self._connection):
            while not self._closed.is_set() and (work := self._ask("next", "GET", "/api/next")["work"]):
                self._rate(work)
                count += 1
        return count

    def _rate(self, work: Mapping[str, Any]) -> None:
        path = f"/api/items/{urllib.parse.quote(work['id'], safe='')}"
        status, content = self._request("image", "GET", work["image"])
        if (status, content) != (200, self._image):
            raise errors.UserError(f"{work['image']}: the server replied {status}, not the image")
        answer, revision = work["answer"], work["revision"]
        for part in self._parts(answer, work["id"]):
            answer = answer | part
            revision = self._save(work["id"], path, answer, revision)
        if self._random.random() < SKIPPED:
            state, sent = "skipped", {"revision": revision, "reason": "too dark", "broken": False}
            self._ask("skip", "POST", f"{path}/skip", sent)
        else:
            state, sent = "done", {"revision": revision, "answer": answer, "seconds": 2.0}
            self._ask("done", "POST", f"{path}/done", sent)
        self.acknowledged[work["id"]] = Acknowledged(revision + 1, state, answer)

    def _save(self, item: str, path: str, answer: Mapping[str, Any], revision: int) -> int:
        """Saves a draft. Returns its new revision."""
        sent = {"revision": revision, "answer": answer, "seconds": 1.0}
        status, content = self._request("save", "PUT", path, sent)
        reply = json.loads(content)
        # It had saved this answer, and its reply was lost.
        is_known = status == 409 and reply["answer"] == answer
        if not (status == 200 or is_known):
            raise errors.UserError(f"{path}: the server replied {status}: {content.decode()}")
        self.acknowledged[item] = Acknowledged(reply["revision"], "draft", answer)
        return reply["revision"]

    def _parts(self, answer: Mapping[str, Any], item: str) -> Iterable[dict[str, Any]]:
        """Yields the parts of a random answer; no two raters give the same one."""
        draw = self._random
        points = {
            f"{kind}_points": [
                [draw.uniform(0, SIDE - 1), draw.uniform(0, SIDE - 1)] for _ in range(draw.randint(0, 3))
            ]
            for kind in feedback.HEATMAPS
        }
        yield points
        yield {
            "token_labels": [
                draw.choice((feedback.MISALIGNED, feedback.ALIGNED)) for _ in answer["token_labels"]
            ],
            "nothing": dict.fromkeys(answer["nothing"], True),
            "ratings": {
                name: draw.randint(feedback.LIKERT_MIN, feedback.LIKERT_MAX) for name in answer["ratings"]
            },
            "comment": f"{item} by {self.name}",
        }

    def _ask(self, kind: str, method: str, path: str, sent: Any = None) -> dict[str, Any]:
        status, content = self._request(kind, method, path, sent)
        if status != 200:
            raise errors.UserError(f"{path}: the server replied {status}: {content.decode()}")
        return json.loads(content)

    def _request(self, kind: str, method: str, path: str, sent: Any = None) -> tuple[int, bytes]:
        """Sends a request, again and again until the server replies. Returns status and content."""
        data = None if sent is None else json.dumps(sent, allow_nan=False).encode()
        while True:
            begin = time.perf_counter()
            try:
                self._connection.request(method, path, data, self._headers)
                response = self._connection.getresponse()
                content = response.read()
            except (OSError, http.client.HTTPException):
                if self._closed.is_set():
                    raise
                self._connection.close()
                self.tries_again += 1
                time.sleep(WAIT)
                continue
            end = time.perf_counter()
            self.times[kind].append((end, end - begin))
            return response.status, content


def make_project(folder: pathlib.Path, items: int, answers: int, seed: int) -> Store:
    """Makes a project whose images are all the same, with prompts of 4 to 12 words."""
    draw = random.Random(seed)
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
    writing.make_folder(folder / project.IMAGES)
    Image.fromarray(pixels).save(folder / project.IMAGES / IMAGE)
    rows = (
        Item(f"{i:05}.png", " ".join(draw.choices(WORDS, k=draw.randint(4, 12))), IMAGE, SIDE, SIDE)
        for i in range(items)
    )
    return Store.create(folder, project.Config(raters=answers, seed=seed), rows)


def count_lost(store: Store, raters: Sequence[Rater]) -> int:
    """Counts the acknowledged states that the database lacks. Raters may go on meanwhile."""
    wanted = {(rater.name, item): kept for rater in raters for item, kept in dict(rater.acknowledged).items()}
    for answer in store.answers(finished=False):
        kept = wanted.get((answer.person.name, answer.item.id))
        if kept is None:
            continue
        # It may be further than the raters know: a reply was lost.
        is_further = kept.state == "draft" and answer.revision > kept.revision
        if is_further or kept == Acknowledged(answer.revision, answer.state, answer.answer):
            del wanted[answer.person.name, answer.item.id]
    return len(wanted)


def measure(
    folder: pathlib.Path, count: int, items: int, answers: int, kills: int, seed: int
) -> dict[str, Any]:
    """Lets raters give all answers.

    Args:
      folder: where the project is made.
      count: number of raters.
      items: number of images.
      answers: answers wanted of each image.
      kills: how often the server is killed.
      seed: seed of prompts, answers and the moments of the kills.

    Returns:
      raters, items, answers_per_item: as given
      kills: how often the server was killed
      lost: acknowledged answers that the database lacked, after a kill or in the end; must be 0
      with_exactly, with_more, with_fewer: images with exactly the wanted answers, more, fewer
      skipped_by_two: images of `with_fewer` that two raters skipped
      requests, tries_again: requests that got a reply, and those that got none
      seconds, requests_per_second: duration of the run with all starts, and the rate
      server_cpu_ms: the server's processor time a request, with all starts
      milliseconds: a request's kind -> {"median", "p95", "growth"}
    """
    with contextlib.closing(make_project(folder, items, answers, seed)) as store:
        names = [f"rater {i}" for i in range(count)]
        secrets = [store.add_rater(name) for name in names]
        image = (folder / project.IMAGES / IMAGE).read_bytes()
        start, cpu_start = time.perf_counter(), _children_seconds()
        server = Server(folder)
        raters = [Rater(n, s, server, image, seed) for n, s in zip(names, secrets, strict=True)]
        killed, lost = _work_and_kill(store, server, raters, items * answers, kills, seed)
        seconds = time.perf_counter() - start
        lost += count_lost(store, raters)
        given = collections.Counter(answer.item.id for answer in store.answers())
        requests = sum(len(times) for rater in raters for times in rater.times.values())
        return {
            "raters": count,
            "items": items,
            "answers_per_item": answers,
            "kills": killed,
            "lost": lost,
            "with_exactly": sum(number == answers for number in given.values()),
            "with_more": sum(number > answers for number in given.values()),
            "with_fewer": items - sum(number >= answers for number in given.values()),
            "skipped_by_two": len(store.for_manager()),
            "requests": requests,
            "tries_again": sum(rater.tries_again for rater in raters),
            "seconds": seconds,
            "requests_per_second": requests / seconds,
            "server_cpu_ms": 1e3 * (_children_seconds() - cpu_start) / requests,
            "milliseconds": {kind: _summary(raters, kind) for kind in KINDS},
        }


def _work_and_kill(
    store: Store, server: Server, raters: Sequence[Rater], total: int, kills: int, seed: int
) -> tuple[int, int]:
    """Lets raters work while it kills the server. Returns numbers of kills and of lost answers."""
    draw = random.Random(seed)
    moments = sorted(draw.randrange(int(LAST_KILL * total) + 1) for _ in range(kills))
    killed = lost = 0
    with (
        concurrent.futures.ThreadPoolExecutor(len(raters)) as pool,
        contextlib.closing(server),
        tqdm.tqdm(total=total, desc="answers", disable=None, unit="") as bar,
    ):
        while True:
            # Who found nothing looks again when all have stopped: another one may have skipped since.
            working = [pool.submit(rater.work) for rater in raters]
            while not all(future.done() for future in working):
                done = sum(len(rater.times["done"]) for rater in raters)
                bar.update(done - bar.n)
                if killed < kills and done >= moments[killed]:
                    time.sleep(draw.uniform(0, WAIT))
                    server.kill()
                    killed += 1
                    lost += count_lost(store, raters)
                    server.start()
                time.sleep(WAIT)
            if not sum(future.result() for future in working):
                return killed, lost


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _summary(raters: Sequence[Rater], kind: str) -> dict[str, float] | None:
    """Returns median, 95th percentile and growth of a kind of request; None where there was none."""
    times = sorted(time for rater in raters for time in rater.times[kind])
    if not times:
        return None
    taken = 1e3 * np.array([taken for _, taken in times])
    tenth = -(-len(taken) // 10)
    return {
        "median": float(np.median(taken)),
        "p95": float(np.percentile(taken, 95)),
        "growth": float(np.median(taken[-tenth:]) / np.median(taken[:tenth])),
    }


@errors.command()
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command. The exit code is 1 if an answer was lost or an image has too many."""
    parser = argparse.ArgumentParser(
        prog="python -m richhf_jax.benchmarks.annotate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, default, text in (
        ("raters", 27, "raters at once"),
        ("items", 17_000, "images"),
        ("answers", 3, "answers that each image gets"),
        ("kills", 20, "times that the server is killed"),
        ("seed", 0, "seed of answers and kills"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default {default})"
        )
    json_file.add_flag(parser)
    options = parser.parse_args(arguments)
    json_file.check(parser, options.json)
    if min(options.raters, options.items, options.answers) < 1 or options.kills < 0:
        parser.error("--raters, --items and --answers must be at least 1, --kills at least 0")
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(
            pathlib.Path(folder), options.raters, options.items, options.answers, options.kills, options.seed
        )
    print(
        "{raters} raters, {items:,} images, {requests:,} requests in {seconds:.0f} s:"
        " {requests_per_second:.0f} a second, {server_cpu_ms:.2f} ms of the server's processor time each\n"
        "{kills} kills: {lost} acknowledged answers lost, {tries_again:,} requests sent again\n"
        "{with_exactly:,} images have exactly {answers_per_item} answers, {with_more} more,"
        " {with_fewer} fewer ({skipped_by_two} skipped by two raters)\n"
        "milliseconds    median     95%  growth".format(**figures)
    )
    for kind, found in figures["milliseconds"].items():
        if found:
            print(f"{kind:14}{found['median']:8.1f}{found['p95']:8.1f}{found['growth']:8.2f}")
    json_file.write(options.json, figures)
    if figures["lost"] or figures["with_more"]:
        raise errors.UserError("answers were lost, or images have too many: see above")


if __name__ == "__main__":
    main()
