"""Attacks by names of files, by images, and by large and slow requests."""

import contextlib
import gzip
import http.client
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import anyio
import pytest
from PIL import Image

from richhf_jax.annotate import __main__ as command
from richhf_jax.annotate import commands, records, web

WIDTH, HEIGHT = 640, 480
ORIGIN = {"Origin": "http://testserver"}
ITEM = "/api/items/train%2F0.png"


# ---- Names of files.


OTHER_ITEMS = [
    "train%2F9.png",
    "train%2F1.png",
    "..%2F..%2Fproject.db",
    "%2Fetc%2Fpasswd",
    "../../project.db",
    "%2e%2e/%2e%2e/project.db",
    "..%5c..%5cproject.db",
    "....//project.db",
    "train/0.png%00",
    "train/0.png/",
    "train//0.png",
    "0.png",
    "%ff",
    "x" * 50_000,
]


def test_other_items_are_not_found(rater, manager, store):
    sent = {"revision": 0, "answer": {}, "seconds": 1}
    skip = {"revision": 0, "reason": "why", "broken": False}
    for item in OTHER_ITEMS:
        assert rater.get(f"/image/{item}").status_code == 404
        place = f"/api/items/{item}"
        for method, end, sending in (("PUT", "", sent), ("POST", "/done", sent), ("POST", "/skip", skip)):
            assert rater.request(method, place + end, json=sending, headers=ORIGIN).status_code == 404
        for place in ("/static", "/manage/image", "/manage/items"):
            # The manager may see all items.
            status = 200 if "/manage" in place and item == "train%2F1.png" else 404
            assert manager.get(f"{place}/{item}").status_code == status


def test_no_file_but_the_static_ones_is_reached(site):
    for place in ("/static", "/image", "/manage/image", "/api/items", "//etc", "", "/static//etc"):
        for up in ("..", "%2e%2e", "..%2f..", "..%5c..", "%2e%2e%2f%2e%2e", "%252e%252e", "/"):
            for name in ("server.py", "templates/base.html", "passwd", "annotate.js%00"):
                status, text = get(site, f"{place}/{up}/{name}")
                assert status in (403, 404, 405)
                assert not any(part in text for part in (b"root:", b"def ", b"{%"))


def test_an_id_is_no_path(site):
    names = ["../../project.db", "/etc/passwd", "a\0b", "x" * 5_000, "%2e%2e", "?#&;", "train/0.png/done"]
    site.store.add_items(records.Item(name, "a", "0.png", WIDTH, HEIGHT, None, 9) for name in names)
    picture = site.store.image_path(site.store.item("train/0.png")).read_bytes()
    person = site.store.person(site.secret)
    for _ in names:
        work = json.loads(get(site, "/api/next")[1])["work"]
        assert get(site, work["image"]) == (200, picture)
        site.store.skip(person, work["id"], 0, "why", False)
    assert sorted(answer.item.id for answer in site.store.answers(finished=False)) == sorted(names)


def test_an_id_that_browsers_change_is_not_taken(tmp_path, capsys):
    """Browsers take dots out of addresses, and the server's routes know no line break."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    ids = ["fine", "..", ".", "a\nb"]
    rows = [json.dumps({"image": "a.png", "prompt": "a cat", "id": one}) for one in ids]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    with pytest.raises(SystemExit) as end:
        command.main(["init", str(tmp_path / "p"), "--images", str(tmp_path / "rows.jsonl")])
    assert end.value.code == commands.SOME_FAILED
    found = capsys.readouterr()
    assert "1 images" in found.out
    assert found.err.count("give another id") == 3


def get(site, place: str) -> tuple[int, bytes]:
    """Gets a page as the rater. Most clients tidy addresses; this one sends them as they are."""
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", place, headers={"Cookie": f"rater{site.port}={site.secret}"})
        response = connection.getresponse()
        return response.status, response.read()


# ---- Images.


def test_types_of_images_come_from_their_bytes(rater, store):
    file = store.image_path(store.item("train/0.png"))
    assert rater.get("/image/train%2F0.png").headers["Content-Type"] == "image/png"
    Image.open(file).save(file, "JPEG")
    response = rater.get("/image/train%2F0.png")
    assert response.headers["Content-Type"] == "image/jpeg"
    assert response.content == file.read_bytes()
    file.write_text("<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>")
    response = rater.get("/image/train%2F0.png")
    assert response.status_code == 404
    assert "onload" not in response.text


def test_what_is_no_image_is_not_served_as_one(rater, store):
    file = store.image_path(store.item("train/0.png"))
    picture = file.read_bytes()
    svg = b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>"
    page = b"<!doctype html><script>alert(1)</script>"
    for data in (svg, b"<?xml version='1.0'?>" + svg, gzip.compress(svg), page, b"", picture[:20], b"GIF89a"):
        file.write_bytes(data)
        response = rater.get("/image/train%2F0.png")
        assert response.status_code == 404
        assert "alert" not in response.text
    # An image that is a page, too, is an image: its type is told, and browsers believe it.
    file.write_bytes(picture + page)
    response = rater.get("/image/train%2F0.png")
    assert response.headers["Content-Type"] == "image/png"
    assert response.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("name", ["a.svg", "a.png"])
def test_an_svg_is_not_taken(tmp_path, capsys, name):
    (tmp_path / name).write_text("<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>")
    with pytest.raises(SystemExit) as end:
        command.main(["init", str(tmp_path / "p"), "--images", str(tmp_path / name), "--prompt=a cat"])
    assert name in str(end.value.code)
    assert not (tmp_path / "p").exists()


# ---- Large and slow requests.


def test_a_huge_body_is_not_read(rater, secret):
    assert rater.put(ITEM, content=b"x" * (web.MAX_BODY + 1), headers=ORIGIN).status_code == 413
    # Without a length: the server stops reading.
    read, sent = [], []

    async def receive():
        read.append(1)
        return {"type": "http.request", "body": bytes(1 << 16), "more_body": len(read) < 1 << 14}

    async def send(message):
        sent.append(message)

    headers = [
        (b"host", b"testserver"),
        (b"origin", b"http://testserver"),
        (b"cookie", f"rater={secret}".encode()),
    ]
    scope = {"type": "http", "method": "PUT", "path": "/api/items/train/0.png", "query_string": b""}
    anyio.run(rater.app, scope | {"headers": headers}, receive, send)
    assert sent[0]["status"] == 413
    assert len(read) <= web.MAX_BODY // (1 << 16) + 1


def test_gigabytes_are_not_read(make_store, tmp_path):
    with contextlib.closing(make_store()) as store:
        rater, manager = store.add_rater("Ada"), store.make_manager()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "richhf_jax.annotate", "serve", tmp_path / "project", f"--port={port}"]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, cwd=pathlib.Path(__file__).parents[2]) as process,
    ):
        try:
            head = f"Host: 127.0.0.1:{port}\r\nOrigin: http://127.0.0.1:{port}\r\n"
            cookies = f"Cookie: rater{port}={rater}; manager{port}={manager}\r\n"
            connect(port).close()
            memory = resident(process.pid)
            for place, kind in (
                (f"PUT {ITEM}", "application/json"),
                (f"POST {ITEM}/done", "application/json"),
                ("POST /manage/exclude", "application/x-www-form-urlencoded"),
                ("POST /manage/reassign", "multipart/form-data; boundary=x"),
                ("GET /api/next", "text/plain"),
                ("POST /nothing", "text/plain"),
            ):
                for who in (cookies, ""):
                    top = f"{place} HTTP/1.1\r\n{head}{who}Content-Type: {kind}\r\n"
                    # With a length it is refused by the length alone.
                    reply = send(port, f"{top}Content-Length: {1 << 30}\r\n\r\n".encode(), 0)
                    assert reply.startswith(b"HTTP/1.1 413" if who else b"HTTP/1.1 4")
                    # Without a length the server closes the connection.
                    send(port, f"{top}Transfer-Encoding: chunked\r\n\r\n".encode(), 1 << 30)
            # A browser that is closed.
            for _ in range(5):
                with connect(port) as one:
                    one.sendall(
                        f"PUT {ITEM} HTTP/1.1\r\n{head}{cookies}Content-Length: 100\r\n\r\n{{".encode()
                    )
            with connect(port) as one:
                one.sendall(f"GET /api/next HTTP/1.1\r\n{head}{cookies}\r\n".encode())
                assert one.recv(1 << 16).startswith(b"HTTP/1.1 200")
            assert resident(process.pid) - memory < 32 << 20
        finally:
            process.kill()
    assert "Traceback" not in (tmp_path / "log").read_text()


def connect(port: int) -> socket.socket:
    """Connects to a server as soon as it has started."""
    end = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), 20)
        except ConnectionRefusedError:
            assert time.monotonic() < end
            time.sleep(0.02)


def send(port: int, head: bytes, size: int) -> bytes:
    """Sends a request and, in chunks, a body until the server closes. Returns the reply.

    The server must close before it has read a sixteenth of the body.
    """
    piece = b"10000\r\n" + b"x=1&" * (1 << 14) + b"\r\n"
    count = 0
    with connect(port) as one:
        try:
            one.sendall(head)
            while count < size:
                one.sendall(piece)
                count += 1 << 16
        except ConnectionError:
            pass
        assert count <= size // 16
        with contextlib.suppress(ConnectionError):
            return one.recv(1 << 16)
    return b""


def resident(process: int) -> int:
    pages = pathlib.Path(f"/proc/{process}/statm").read_text(encoding="utf-8").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def test_idle_connections_keep_nobody_waiting(site):
    """Some send nothing, some half a request and some a body that never ends."""
    head = f"Host: 127.0.0.1:{site.port}\r\nOrigin: http://127.0.0.1:{site.port}\r\n"
    cookie = f"Cookie: rater{site.port}={site.secret}\r\n"
    starts = (
        "",
        "GET / HT",
        f"GET / HTTP/1.1\r\n{head}X: ",
        f"PUT {ITEM} HTTP/1.1\r\n{head}{cookie}Content-Length: 99\r\n\r\n{{",
    )
    with contextlib.ExitStack() as stack:
        # More than the server has threads.
        for number in range(200):
            one = stack.enter_context(connect(site.port))
            one.sendall(starts[number % len(starts)].encode())
        start = time.monotonic()
        assert get(site, "/api/next")[0] == 200
        assert time.monotonic() - start < 10
