"""The web demo: its handlers without gradio, and, where gradio and a browser are, the page as a person sees it."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.tiny import tiny_hero_pipeline
from vargen.cli.main import app
from vargen.display.notebook import output_sheet
from vargen.display.preview import LivePreview
from vargen.pipelines.image import ImagePipeline
from vargen.serving import studio as drawing
from vargen.serving.demo import build_page, drawable_models, serve
from vargen.serving.same_site import MAX_BODY, SameSite
from vargen.serving.studio import MAX_IMAGES, Studio

ROOT = Path(__file__).parents[1]
PROMPT = "minotaur with a battle axe"


@pytest.fixture
def studio(monkeypatch):
    pipes = []

    def load(name):
        assert name == "tiny"
        pipes.append(tiny_hero_pipeline())
        return pipes[-1]

    monkeypatch.setattr(ImagePipeline, "from_pretrained", load)
    made = Studio()
    made.loaded = pipes
    return made


def test_previews_come_before_the_pictures(studio):
    updates = list(studio.draw("tiny", PROMPT, "jacobi", seed=3, temperature=0.2, num_images=2))
    *previews, (picture, maps, line) = updates
    assert all(text == "drawing ..." and later is None for _, later, text in previews)
    plain = {"seed": 3, "temperature": 0.2, "num_images_per_prompt": 2}
    expected = studio.pipe("tiny")(PROMPT, **plain)  # next-token sampling: the same pictures
    assert np.array_equal(np.asarray(picture), np.asarray(output_sheet(expected)))
    assert line.startswith("2 images · ")
    assert "exact · seeds 3, 4" in line
    assert maps is not None


def test_the_model_is_loaded_once_and_keeps_its_sampler(studio):
    own = studio.pipe("tiny").sampler
    for name in ("jacobi", "next-token"):
        list(studio.draw("tiny", PROMPT, name, seed=3))
    assert len(studio.loaded) == 1
    assert studio.pipe("tiny").sampler is own
    assert studio.defaults("tiny") == {"sampler": "next-token", "guidance_scale": 1.0, "temperature": 1.0}
    assert {"next-token", "jacobi"} <= set(studio.samplers("tiny"))


def test_errors_are_those_of_the_call(studio):
    with pytest.raises(ValueError, match="prompt is empty"):
        list(studio.draw("tiny", " ", "jacobi"))
    with pytest.raises(ValueError, match="unknown sampler 'jacoby'"):
        list(studio.draw("tiny", PROMPT, "jacoby"))
    with pytest.raises(ValueError, match=r"num_images must be an integer in 1\.\.16, got 17"):
        list(studio.draw("tiny", PROMPT, "jacobi", num_images=MAX_IMAGES + 1))
    assert list(studio.draw("tiny", PROMPT, "jacobi", seed=0))  # it still works


class Held:
    """Previews that stop at one step until the test lets them go on."""

    def __init__(self, monkeypatch, step=3):
        self.reached, self.go_on = threading.Event(), threading.Event()
        call = LivePreview.__call__

        def held(preview, pipe, at, *state):
            call(preview, pipe, at, *state)
            if at == step:
                self.reached.set()
                assert self.go_on.wait(60)

        monkeypatch.setattr(LivePreview, "__call__", held)

    def begin(self, updates):
        """Read updates up to the step."""
        first = next(updates)
        assert self.reached.wait(60)
        return first


def test_closing_the_iterator_stops_the_decode(studio, monkeypatch):
    works, init = [], drawing._Work.__init__

    def recorded(work, *args):
        works.append(work)
        init(work, *args)

    monkeypatch.setattr(drawing._Work, "__init__", recorded)
    held = Held(monkeypatch)
    updates = studio.draw("tiny", PROMPT, "next-token", seed=0)
    held.begin(updates)
    updates.close()
    held.go_on.set()
    works[0].thread.join(60)
    assert works[0].result.stats.notes == ["interrupted after 5 forward passes"]
    assert list(studio.draw("tiny", PROMPT, "next-token", seed=0))[-1][2].startswith("1 image · 16 forwards")


def test_stop_ends_the_drawing_of_its_own_session(studio, monkeypatch):
    held = Held(monkeypatch)
    updates = studio.draw("tiny", PROMPT, "next-token", seed=0, session="mine")
    held.begin(updates)
    studio.stop("another's")
    assert not any(stopping.is_set() for stopping in studio._asked)
    studio.stop("mine")
    held.go_on.set()
    picture, _, line = list(updates)[-1]
    assert line.startswith("stopped · ")
    assert line.endswith(" · interrupted after 5 forward passes")
    assert picture is not None  # what there was
    assert not studio._busy.locked()
    assert not studio._asked


def test_a_drawing_that_waits_can_be_stopped_and_the_other_goes_on(studio, monkeypatch):
    held = Held(monkeypatch)
    first = studio.draw("tiny", PROMPT, "next-token", seed=0, session="first")
    held.begin(first)
    second = studio.draw("tiny", PROMPT, "next-token", seed=0, session="second")
    assert next(second)[2] == "waiting for another drawing ..."
    studio.stop("second")
    assert [line for _, _, line in second] == ["stopped before it began"]
    held.go_on.set()
    assert list(first)[-1][2].startswith("1 image · 16 forwards")


def test_what_cannot_be_drawn_is_refused_without_waiting_for_a_turn(studio):
    class Forbidden:
        def acquire(self, timeout=None):
            raise AssertionError("waited for a turn")

    studio._busy = Forbidden()
    many = " ".join(f"zxq{i}" for i in range(2000))
    for prompt, message in (
        ("a minotaur with a lightsaber", "unknown word in the prompt: 'lightsaber'"),
        (many, "the prompt may have 10000 characters, got 14889"),
        (many[:5000], "a prompt may have 1000 characters, got 5000"),
        (many[:900], "a prompt may have 100 words, got"),
        (many[:500], "unknown words in the prompt: 'zxq0', 'zxq1', 'zxq2' and"),
        (7, "must be a text"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            list(studio.draw("tiny", prompt, "jacobi"))
        assert len(str(error.value)) < 300
    for wrong in (
        {"temperature": -1},
        {"guidance_scale": "x"},
        {"seed": 2**64},
        {"num_images": 2.5},
        {"sampler": ["jacobi"]},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            list(studio.draw(**{"model": "tiny", "prompt": PROMPT, "sampler": "jacobi", **wrong}))
    with pytest.raises(AssertionError, match="waited"):
        list(studio.draw("tiny", PROMPT, "jacobi", seed=4.0, num_images=1.0))


def test_models_of_the_page_draw_images():
    assert {"heroes32-llamagen", "heroes32-var", "heroes32-nar"} <= set(drawable_models())
    assert "heroes32-classifier" not in drawable_models()


def test_without_gradio_the_command_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else find(name))
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 2
    assert result.output.strip() == "error: vargen demo needs gradio; install it with: pip install 'vargen[demo]'"


def answer(guard, host=b"127.0.0.1:7860", origin=None, kind="http", more=()):
    """Status of a request, None for a WebSocket that is closed; 200 and "open" where it reaches the page."""
    sent = []

    async def page(scope, receive, send):
        sent.append(200 if scope["type"] == "http" else "open")

    async def receive():
        return {"type": f"{kind}.connect"}

    async def send(message):
        sent.append(message.get("status"))

    headers = [(b"host", host)] if host is not None else []
    headers += [(b"origin", origin)] if origin is not None else []
    guard.app = page
    asyncio.run(guard({"type": kind, "headers": [*headers, *more]}, receive, send))
    return sent[0]


LOCAL = [b"127.0.0.1:7860", b"localhost:7860", b"LOCALHOST", b"[::1]:7860", b"127.8.9.1:80", b"localhost:9000"]
FOREIGN = [
    b"evil.example", b"evil.example:7860", b"localhost.evil.example:7860", b"127.0.0.1.evil.example", b"192.168.1.5:7860", b"0.0.0.0:7860",
    b"", b"localhost:7860@evil.example", b"localhost:port", b"evil.example#localhost", b"[::2]:7860", b"\xff\x00", None,
]  # fmt: skip


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_requests_under_foreign_names_are_refused(kind):
    guard = SameSite(None, "127.0.0.1", 7860)
    through, refused = {"http": (200, 403), "websocket": ("open", None)}[kind]
    assert {answer(guard, host, kind=kind) for host in LOCAL} == {through}
    assert {answer(guard, host, kind=kind) for host in FOREIGN} == {refused}
    assert answer(guard, more=[(b"host", b"localhost")], kind=kind) == refused  # two of them


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_requests_from_foreign_pages_are_refused(kind):
    guard = SameSite(None, "127.0.0.1", 7860)
    through, refused = {"http": (200, 403), "websocket": ("open", None)}[kind]
    assert answer(guard, origin=b"http://127.0.0.1:7860", kind=kind) == through
    assert answer(guard, b"localhost", b"http://localhost:80", kind=kind) == through
    assert answer(guard, b"localhost", b"https://localhost", kind=kind) == through
    for origin in (
        b"https://evil.example", b"http://evil.example:7860", b"null", b"", b"http://localhost:7860", b"http://127.0.0.1:8000",
        b"http://127.0.0.1", b"file://127.0.0.1:7860", b"127.0.0.1:7860", b"http://127.0.0.1:7860.evil.example",
    ):  # fmt: skip
        assert answer(guard, origin=origin, kind=kind) == refused, origin
    twice = [(b"origin", b"http://127.0.0.1:7860")] * 2
    assert answer(guard, more=twice, kind=kind) == refused


def test_further_names_are_served_where_they_are_asked_for():
    own = SameSite(None, "Render.lan", 8000)
    assert [answer(own, host) for host in (b"render.lan:8000", b"render.lan:8001", b"render.lan", b"localhost")] == [
        200,
        403,
        403,
        200,
    ]
    everywhere = SameSite(None, "0.0.0.0", 7860)
    assert [answer(everywhere, host) for host in (b"192.168.1.5:7860", b"[fe80::1]:80", b"render.lan:7860")] == [
        200,
        200,
        403,
    ]
    proxied = SameSite(None, "127.0.0.1", 7860, ["demo.example.org", "10.0.0.7"])
    assert answer(proxied, b"demo.example.org", b"https://demo.example.org") == 200
    assert answer(proxied, b"127.0.0.1:7860", b"https://demo.example.org") == 200  # a proxy that sends its own Host
    assert answer(proxied, b"10.0.0.7:7860") == 200
    assert answer(proxied, b"demo.example.com") == 403
    for name in ("http://x.org", "x.org:80", "", "a b", "*", "::x"):
        with pytest.raises(ValueError, match="without scheme and port"):
            SameSite(None, "127.0.0.1", 7860, [name])


def test_large_bodies_are_refused():
    guard = SameSite(None, "127.0.0.1", 7860)
    for length, status in (
        (b"0", 200),
        (str(MAX_BODY).encode(), 200),
        (str(MAX_BODY + 1).encode(), 413),
        (b"9" * 5000, 413),
        (b"-1", 413),
    ):
        assert answer(guard, more=[(b"content-length", length)]) == status
    assert answer(guard, more=[(b"transfer-encoding", b"chunked")]) == 413


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Client:
    """What a browser sends to the page."""

    def __init__(self, port, **headers):
        self.port, self.headers = port, {"Host": f"127.0.0.1:{port}", **headers}

    def ask(self, method, path, body=None):
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        text = None if body is None else json.dumps(body)
        connection.request(method, path, text, {"Content-Type": "application/json", **self.headers})
        response = connection.getresponse()
        return response.status, response.read().decode()

    def press(self, page, name, data, session):
        """Run a handler of the page to its end; the last message."""
        index = next(i for i, fn in page.fns.items() if fn.fn is not None and fn.fn.__name__ == name)
        body = {"data": data, "fn_index": index, "session_hash": session}
        status, text = self.ask("POST", "/gradio_api/queue/join", body)
        assert status == 200, text
        status, text = self.ask("GET", f"/gradio_api/queue/data?session_hash={session}")
        found = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
        return next(message for message in found if message["msg"] == "process_completed")

    def stop(self, page, session):
        index = next(i for i, fn in page.fns.items() if fn.fn is not None and fn.fn.__name__ == "halt")
        return self.ask("POST", "/gradio_api/run/predict", {"data": [], "fn_index": index, "session_hash": session})


@pytest.fixture
def served(studio, monkeypatch):
    """A page with a tiny model, really served."""
    pytest.importorskip("gradio")
    monkeypatch.setattr("vargen.serving.demo.drawable_models", list)
    page, port = build_page(studio, "tiny"), free_port()
    serve(page, "127.0.0.1", port, wait=False)
    yield page, port
    page.close()


@pytest.mark.slow
def test_the_served_page_refuses_other_sites_and_stops(served, studio, monkeypatch):
    page, port = served
    settings = ["tiny", PROMPT, "next-token", 0, 1, 1, 1]
    own = Client(port, Origin=f"http://127.0.0.1:{port}")
    endpoints = [
        ("GET", "/"),
        ("GET", "/config"),
        ("GET", "/gradio_api/queue/data?session_hash=a"),
        ("GET", "/gradio_api/heartbeat/a"),
    ]
    endpoints += [
        ("POST", f"/gradio_api/{path}") for path in ("queue/join", "run/predict", "upload", "cancel", "call/draw")
    ]
    for client in (Client(port, Host="evil.example"), Client(port, Origin="https://evil.example")):
        assert {client.ask(method, path, {} if method == "POST" else None)[0] for method, path in endpoints} == {403}
    assert own.ask("GET", "/")[0] == 200
    assert own.ask("POST", "/gradio_api/queue/join", {"data": ["x" * MAX_BODY]})[0] == 413

    assert own.press(page, "draw", settings, "a")["output"]["data"][2].startswith("1 image · 16 forwards")
    many = own.press(page, "draw", ["tiny", " ".join(f"zxq{i}" for i in range(2000)), *settings[2:]], "b")
    assert not many["success"]
    assert "the prompt may have 10000 characters" in many["output"]["error"]
    assert len(json.dumps(many)) < 1000
    other = own.press(page, "draw", ["heroes32-nar", *settings[1:]], "c")
    assert not other["success"]
    assert len(studio.loaded) == 1

    held = Held(monkeypatch)
    found = []
    drawing = threading.Thread(target=lambda: found.append(own.press(page, "draw", settings, "d")))
    drawing.start()
    assert held.reached.wait(60)
    assert own.stop(page, "e")[0] == own.stop(page, "d")[0] == 200
    held.go_on.set()
    drawing.join(60)
    assert "interrupted after 5 forward passes" in found[0]["output"]["data"][2]
    assert not studio._busy.locked()


@pytest.mark.slow
def test_the_page_draws_in_a_browser(tmp_path):
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    port = free_port()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "vargen", "demo", "-m", "heroes32-nar", "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        wait_for(port, server, tmp_path / "log")
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(f"http://127.0.0.1:{port}", timeout=60_000)
            page.get_by_label("Prompt").fill(PROMPT, timeout=60_000)
            page.get_by_role("button", name="Draw").click()
            page.get_by_text("4 images · 31 forwards an image").wait_for(timeout=120_000)
            page.wait_for_function("[...document.images].some(image => image.naturalWidth > 400)")
            page.screenshot(path=os.environ.get("VARGEN_DEMO_SCREENSHOT", str(tmp_path / "page.png")), full_page=True)
            page.get_by_label("Prompt").fill("minotaur with a lightsaber")
            page.get_by_role("button", name="Draw").click()
            page.get_by_text("unknown word in the prompt: 'lightsaber'").wait_for(timeout=60_000)
            browser.close()
    finally:
        server.terminate()
        server.wait(30)


def wait_for(port: int, server: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + 180
    while time.monotonic() < until:
        assert server.poll() is None, log.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise AssertionError(f"no server after three minutes: {log.read_text()}")
