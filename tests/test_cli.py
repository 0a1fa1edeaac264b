"""The command line: what it writes, what it prints, how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import vargen
from tests.tiny import tiny_backbone, tiny_pipeline
from vargen.cli import _common
from vargen.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("generate", "models", "convert", "verify", "train", "data heroes", "eval fid", "eval compare")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _plain_and_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv(_common.DEBUG_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)


def run(*arguments: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
    return result


def in_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vargen.cli", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


def generate(model: str, *arguments: Any, code: int = 0) -> Any:
    return run("generate", "-m", model, "-c", "3", "--seed", "5", *arguments, code=code)


class TestGenerate:
    def test_grid(self, model: str) -> None:
        result = generate(model, "-n", "5", "--columns", "3", "--scale", "2")
        sheet = Image.open("out.png")
        assert sheet.size == (3 * 18 + 2, 2 * 18 + 2)
        for shown in ("5..9", "NextTokenSampler (exact)", "16 (1.00 codes each)", "out.png", "seconds"):
            assert shown in result.stdout, result.stdout

    def test_grid_holds_the_pipelines_images(self, model: str) -> None:
        generate(model, "-n", "2", "--scale", "1", "--columns", "2")
        image = tiny_pipeline()(class_labels=3, seed=6).images[0]
        assert Image.open("out.png").crop((12, 2, 20, 10)).tobytes() == image.tobytes()

    def test_grid_remembers_how_it_was_made(self, model: str) -> None:
        generate(model, "-n", "2", "-g", "2.5", "--top-k", "9", "-o", "a.png")
        text = Image.open("a.png").text  # type: ignore[attr-defined]
        assert json.loads(text["seeds"]) == [5, 6]
        assert json.loads(text["prompts"]) == ["3"]
        assert text["sampler"] == "NextTokenSampler"
        assert (settings := json.loads(text["settings"]))["guidance_scale"] == 2.5
        assert settings["top_k"] == 9
        assert text["vargen"] == vargen.__version__

    def test_separate_images_repeat_from_their_own_text(self, model: str) -> None:
        generate(model, "-c", "4", "-n", "2", "--separate", "-o", "out", "--temperature", "0.7")
        files = sorted(Path("out").iterdir())
        assert [file.name for file in files] == [f"{i:04d}-seed{5 + i}.png" for i in range(4)]
        image = Image.open(files[3])
        text = image.text  # type: ignore[attr-defined]
        settings = json.loads(text["settings"])
        again = tiny_pipeline()(class_labels=int(text["prompt"]), seed=int(text["seed"]), **settings).images[0]
        assert again.tobytes() == image.tobytes()

    def test_sampler_by_name_with_settings(self, model: str) -> None:
        generate(model, "-o", "a.png", "--scale", "1")
        result = generate(model, "-o", "b.png", "--scale", "1", "-s", "jacobi", "--set", "window=4")
        assert "SpeculativeJacobiSampler (exact)" in result.stdout
        assert Image.open("a.png").tobytes() == Image.open("b.png").tobytes()
        assert json.loads(Image.open("b.png").text["settings"])["window"] == 4  # type: ignore[attr-defined]

    def test_seed_is_drawn_and_shown(self, model: str) -> None:
        torch.manual_seed(0)
        result = run("generate", "-m", model, "-c", "3", "--separate")
        (file,) = Path("out").iterdir()
        assert file.stem.removeprefix("0000-seed") in result.stdout

    def test_overwrite(self, model: str) -> None:
        Path("out.png").write_text("precious")
        generate(model, code=2)
        assert Path("out.png").read_text() == "precious"
        generate(model, "--overwrite")
        assert Image.open("out.png").format == "PNG"

    def test_labels(self, model: str) -> None:
        generate(model, "-o", "a.png", "-n", "2")
        generate(model, "-o", "b.png", "-n", "2", "--labels")
        assert Image.open("b.png").height > Image.open("a.png").height

    def test_threads_are_those_asked_for_and_one_for_a_small_model(self, model: str) -> None:
        before = torch.get_num_threads()
        try:
            generate(model, "-o", "a.png", "--threads", "2")
            assert torch.get_num_threads() == 2
            generate(model, "-o", "b.png")
            assert torch.get_num_threads() == 1
        finally:
            torch.set_num_threads(before)

    def test_batch_size_does_not_matter(self, model: str) -> None:
        generate(model, "-o", "a.png", "-n", "3")
        generate(model, "-o", "b.png", "-n", "3", "--batch-size", "1")
        assert Image.open("a.png").tobytes() == Image.open("b.png").tobytes()


class TestFailures:
    BAD: tuple[tuple[list[str], str], ...] = (
        (["generate"], "give prompts or --class-label, got neither"),
        (["generate", "x", "-c", "1"], "got both"),
        (["generate", "x", "-m", "heros32"], "unknown model 'heros32'"),
        (["generate", "x", "-m", "/nowhere/at/all"], "no model folder"),
        (["generate", "x", "-o", "/nowhere/out.png"], "the folder /nowhere does not exist"),
        (["generate", "x", "-o", "out.jpg"], "must be a .png file"),
        (["generate", "x", "--columns", "0"], "--columns must be at least 1"),
        (["generate", "x", "--threads", "0"], "--threads must be at least 1"),
        (["generate", "x", "-s", "jacoby"], "did you mean jacobi"),
        (["generate", "x", "--set", "window"], "name=value"),
        (["generate", "x", "--dtype", "int8"], "dtype must be one of"),
        (["generate", "x", "--device", "tpu9"], "device 'tpu9'"),
        (["verify", "nothing.pt"], "nothing.pt"),
        (["convert", "nothing.pt", "folder"], "nothing.pt"),
        (["convert", "nothing.pt", "folder", "--grid-size", "4x"], "--grid-size must look like"),
        (["models", "nothing"], "unknown model 'nothing'"),
        (["data", "heroes"], "give either -n or --rebuild"),
        (["data", "heroes", "-n", "3"], "-o DIR"),
        (["train", "nothing"], "nothing"),
    )

    @pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
    def test_one_line_and_nothing_written(self, arguments: list[str], message: str, tmp_path: Path) -> None:
        result = run(*arguments, code=2)
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ")
        assert message in line
        assert result.stdout == ""
        assert list(tmp_path.iterdir()) == []

    def test_failure_inside_the_run_writes_nothing(self, model: str, tmp_path: Path) -> None:
        for bad in (["--temperature", "-1"], ["-c", "99"], ["--top-p", "0"], ["--set", "windo=3"], ["-n", "0"]):
            (line,) = generate(model, *bad, code=2).stderr.splitlines()
            assert "Traceback" not in line
        assert list(tmp_path.iterdir()) == []

    def test_line_is_red_on_a_terminal(self, capsys: pytest.CaptureFixture[str]) -> None:
        result = CliRunner().invoke(app, ["generate"], color=True)
        assert result.stderr.startswith("\x1b[31merror: ")

    def test_unexpected_error_is_one_line_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("vargen.registry.shipped_models", lambda: 1 / 0)
        (line,) = run("models", code=1).stderr.splitlines()
        assert line == "error: internal error, ZeroDivisionError: division by zero (VARGEN_DEBUG=1 shows where)"

    def test_debug_variable_shows_the_stack(self) -> None:
        done = in_process("generate", VARGEN_DEBUG="1")
        assert "Traceback" in done.stderr
        assert "Traceback" not in in_process("generate").stderr


class TestOtherCommands:
    def test_version(self) -> None:
        assert run("--version").stdout == f"vargen {vargen.__version__}\n"

    @pytest.mark.parametrize("command", COMMANDS)
    def test_help_has_examples(self, command: str) -> None:
        text = run(*command.split(), "--help").stdout
        assert f"vargen {command}" in text.split("Examples:")[1]

    def test_help_is_quick_and_needs_no_torch(self) -> None:
        code = "import sys\nfrom vargen.cli.main import app\ntry:\n    app(['--help'])\nexcept SystemExit:\n    print('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.stdout.splitlines()[-1] == "False"

    def test_models_lists_samplers_with_their_guarantees(self) -> None:
        text = run("models").stdout
        assert "next-token" in text
        assert "exact" in text
        assert "LlamaGenTransformer" in text

    def test_verify_accepts_what_is_complete_and_refuses_what_is_not(self) -> None:
        state_dict = tiny_backbone(condition_rope="zero").state_dict()
        torch.save({"model": state_dict}, "good.pt")
        assert "LlamaGen class-to-image transformer" in run("verify", "good.pt").stdout
        state_dict.pop("layers.1.attention.wo.weight")
        torch.save({"model": state_dict}, "bad.pt")
        result = run("verify", "bad.pt", code=2)
        assert "layers.1.attention.wo.weight" in result.stdout
        assert len(result.stderr.splitlines()) == 1

    def test_convert_one_model(self) -> None:
        torch.save({"model": tiny_backbone().state_dict()}, "gpt.pt")
        run("convert", "gpt.pt", "folder", "--grid-size", "4x4", "--num-heads", "2")
        loaded = vargen.LlamaGenTransformer.from_pretrained("folder")
        assert torch.equal(loaded.output.weight, tiny_backbone().output.weight)

    def test_heroes(self) -> None:
        run("data", "heroes", "-n", "3", "-o", "heroes")
        assert len(list(Path("heroes").glob("*.png"))) == 3


@pytest.mark.slow
def test_demo_command_is_quick_enough(tmp_path: Path) -> None:
    if "heroes32-llamagen" not in [path.name for path in (ROOT / "vargen/assets/models").glob("*")]:
        pytest.skip("the shipped model is not in this tree")
    prompt = "deep elf with a red cloak, wizard hat and great sword"
    start = time.perf_counter()
    done = in_process("generate", prompt, "-n", "16", "--seed", "7", "-o", str(tmp_path / "demo.png"))
    print(f"{time.perf_counter() - start:.1f} s")  # shown with -rP; no assertion on time
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "demo.png").size[0] > 400
