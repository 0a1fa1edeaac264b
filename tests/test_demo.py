"""The web demo: its handlers without gradio, and, where gradio and a browser are, the page as a person sees it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.tiny import tiny_hero_pipeline
from vargen import demo
from vargen.cli.main import app
from vargen.demo import MAX_IMAGES, Studio, drawable_models
from vargen.display import output_sheet
from vargen.pipelines.image import ImagePipeline
from vargen.preview import LivePreview

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
    with pytest.raises(ValueError, match=r"num_images must be in 1\.\.16, got 17"):
        list(studio.draw("tiny", PROMPT, "jacobi", num_images=MAX_IMAGES + 1))
    assert list(studio.draw("tiny", PROMPT, "jacobi", seed=0))  # it still works


def test_closing_the_iterator_stops_the_decode(studio, monkeypatch):
    call, stop, stopped = LivePreview.__call__, demo._Work.stop, []

    def slowly(self, *args):
        time.sleep(0.05)
        call(self, *args)

    def watched(work):
        stop(work)
        stopped.append(work.result)

    monkeypatch.setattr(LivePreview, "__call__", slowly)
    monkeypatch.setattr(demo._Work, "stop", watched)
    drawing = studio.draw("tiny", PROMPT, "next-token", seed=0)
    next(drawing)
    drawing.close()
    assert stopped[0].stats.num_forwards < 16
    assert "interrupted" in stopped[0].stats.notes[0]
    assert list(studio.draw("tiny", PROMPT, "next-token", seed=0))[-1][2].startswith("1 image · 16 forwards")


def test_models_of_the_page_draw_images():
    assert {"heroes32-llamagen", "heroes32-var", "heroes32-nar"} <= set(drawable_models())
    assert "heroes32-classifier" not in drawable_models()


def test_without_gradio_the_command_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else find(name))
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 2
    assert result.output.strip() == "error: vargen demo needs gradio; install it with: pip install 'vargen[demo]'"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


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
