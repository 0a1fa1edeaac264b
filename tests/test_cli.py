"""The command line: what it writes, what it prints, how it fails."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import time
from contextlib import redirect_stderr
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

import vargen
from tests.outside import cannot_steer
from tests.tiny import tiny_backbone, tiny_pipeline, tiny_scale_pipeline
from vargen.cli import _common, _drawing
from vargen.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
COMMAND = typer.main.get_command(app)  # built once: quicker than a runner that builds it for every call
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

    NUMBERS: tuple[tuple[list[str], str], ...] = (
        (["generate", "x", "-n", "999999999999"], "-n must be in 1..10000, got 999999999999"),
        (["generate", "x", "y", "-n", "5001"], "-n must be in 1..5000 of each of 2 prompts"),
        (["generate", "x", "-n", "1" + "0" * 400], "-n must be in 1..10000, got an integer of about 400 digits"),
        (["generate", "x", "-n", "-1"], "-n must be in 1..10000"),
        (["generate", "x", "--scale", "100000"], "--scale must be at most 256"),
        (["generate", "x", "--threads", "999999"], "--threads must be at most"),
        (["generate", "x", "--columns", "9" * 30], "--columns must be at most 10,000"),
        (["generate", "x", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["generate", "x", "--device", "meta"], "device 'meta' draws nothing"),
        (["generate", "x", "--device", "cpu:7"], "device 'cpu:7' is not available"),
        (["generate", "x", "--device", "cuda:99999"], "device 'cuda:99999' is not available"),
        (["generate", "x", "--device", "\x1b[31m"], "unknown device '\\x1b[31m'"),
        (["generate", "x", "--set", "window=1" + "0" * 400], "an integer of about 400 digits"),
        (["generate", "x", "--set", "window=" + "[" * 3000], "nests its values too deeply"),
        (["generate-video", "x", "-n", "999999999999"], "-n must be in 1..10000"),
        (["generate-video", "x", "--scale", "-1"], "--scale must be at least 1"),
        (["generate-video", "x", "--threads", "999999"], "--threads must be at most"),
        (["generate-video", "--frames", "/dev/zero"], "/dev/zero is not a file"),
        (["eval", "fid", "-o", "e", "-n", "999999999999"], "--num must be at most 1,000,000"),
        (["eval", "fid", "-o", "e", "--classes", "1" + "0" * 400], "--classes must be at most"),
        (["eval", "fid", "-o", "e", "--timeout", "nan"], "--timeout must be at least 0.001"),
        (["eval", "fid", "-o", "e", "--device", "meta"], "device 'meta' draws nothing"),
        (["eval", "reconstruction", "-n", "999999999999"], "--num must be at most"),
        (["eval", "likelihood", "-n", "1"], "--num must be at least 2"),
        (["eval", "classifier", "--steps", "999999999999"], "--steps must be at most"),
        (["bench", "-o", "b", "-n", "999999999999"], "--num must be at most"),
        (["bench", "-o", "b", "--batch", "1,99999"], "a batch size must look like"),
        (["bench", "-o", "b", "--repeats", "0"], "--repeats must be at least 1"),
        (["data", "heroes", "-n", "999999999999", "-o", "d"], "-n must be at most 1,000,000"),
        (["convert", "a.pt", "d", "--grid-size", "1000000000x1000000000"], "--grid-size must look like"),
        (["convert", "a.pt", "d", "--grid-size", "²"], "--grid-size must look like"),
        (["train", "heroes32-vq", "--set", "name=../../elsewhere"], "name must be the plain name of a folder"),
        (["train", "heroes32-vq", "--set", "seed=1" + "0" * 400], "an integer of about 400 digits"),
    )
    BAD += NUMBERS

    @pytest.mark.parametrize(("arguments", "message"), BAD, ids=[ascii(" ".join(a))[:60] for a, _ in BAD])
    def test_one_line_and_nothing_written(self, arguments: list[str], message: str, tmp_path: Path) -> None:
        result = run(*arguments, code=2)
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ")
        assert message in line
        assert result.stdout == ""
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["-n", "10000", "--scale", "200"], "a sheet of 10000 images would have 160202 x 160202 pixels"),
            (["--separate", "-n", "1", "--scale", "256"], ""),
            (["-n", "4", "--scale", "256"], ""),
        ],
    )
    def test_sheet_too_large_is_refused_before_anything_is_drawn(
        self, model: str, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        drawn: list[Any] = []
        monkeypatch.setattr(vargen.NextTokenSampler, "sample", lambda *_a, **_k: drawn.append(1) or 1 / 0)
        result = generate(model, *arguments, code=2 if message else 1)
        assert message in result.stderr
        assert bool(drawn) == (not message)

    def test_sheet_of_a_video_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from vargen.cli import generate_video

        pipe = SimpleNamespace(
            tokenizer=SimpleNamespace(downsample=(4, 4)), backbone=SimpleNamespace(grid_size=(3, 2, 2)), num_frames=500
        )
        assert _drawing.picture_size(pipe) == (8, 8)
        generate_video._check_sheet(pipe, 4, None, 10)
        with pytest.raises(ValueError, match="500 frames of"):
            generate_video._check_sheet(pipe, 40, None, 20)

    def test_picture_size_is_that_of_the_pictures(self) -> None:
        for pipe in (tiny_pipeline(), tiny_scale_pipeline()):
            assert pipe(class_labels=1, seed=0).images[0].size == _drawing.picture_size(pipe)
        autoencoder = SimpleNamespace(config=SimpleNamespace(block_out_channels=(8, 8, 8)))
        backbone = SimpleNamespace(grid_size=(4, 6), config=SimpleNamespace(patch_size=2))
        assert _drawing.picture_size(SimpleNamespace(tokenizer=autoencoder, backbone=backbone)) == (48, 32)

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        options=st.dictionaries(
            st.sampled_from(["-n", "--seed", "-g", "--temperature", "--top-k", "--top-p", "--columns", "--scale",
                             "--batch-size", "--threads", "--dtype", "--device", "--set", "-c"]),
            st.one_of(st.integers().map(str), st.floats().map(str), st.integers(0, 5).map(str), st.text(max_size=5),
                      st.sampled_from(["1" + "0" * 400, "1" + "0" * 5000, "1e999", "window=1e999", "meta", "cuda:9", "²",
                                       "top_k=1" + "0" * 300, "x=" + "[" * 2000, "--5", "\x1b[2J", "\u202e"])),
            max_size=4,
        ),
        video=st.booleans(),
    )  # fmt: skip
    def test_any_numbers_are_taken_or_refused_in_one_line(
        self, options: dict[str, str], video: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Up to the call of the pipeline, which has tests of its own: nothing is drawn here."""

        def load(_kind: Any, _model: str, device: str | None, dtype: str) -> Any:
            _common.pick_device(device)
            _common.pick_dtype(dtype)
            return called

        class Called(SimpleNamespace):
            def __call__(self, **_arguments: Any) -> Any:
                raise ValueError("called")

        size = {"tokenizer": SimpleNamespace(downsample=2), "backbone": SimpleNamespace(grid_size=(4, 4))}
        called = Called(**size, num_frames=5, sampler=vargen.NextTokenSampler())
        monkeypatch.setattr(_drawing, "load_pipeline", load)
        monkeypatch.setattr(_drawing, "set_threads", lambda *_given: None)
        arguments = [part for pair in options.items() for part in pair]
        command = ["generate-video" if video else "generate", *arguments, *([] if "-c" in options else ["--", "orc"])]
        errors = io.StringIO()
        with redirect_stderr(errors), pytest.raises(SystemExit) as left:
            COMMAND.main(command, prog_name="vargen")
        assert left.value.code == 2, command
        *usage, line = errors.getvalue().splitlines()
        assert cannot_steer(line), command
        assert not usage or usage[0].startswith("Usage:"), (
            command
        )  # a value that is no number at all: as click says it

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

    def test_names_cannot_steer_the_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In errors, in wrong usage, in tables, in pages, in cards and in the stack that is shown on request."""
        name = "a\x1b[31m\x07\u202e[bold]b\udcff.pt"
        escaped = r"a\x1b[31m\x07\u202e[bold]b\udcff.pt"
        raw = ["generate", "x", "-o", f"{name}/x.png"]  # refused by a check that quotes the name as it is
        for arguments in (["verify", name], ["models", name, name], ["convert", name, "d"], [name], raw):
            line = run(*arguments, code=2).stderr
            assert escaped in line, arguments
            assert line.replace("\n", "").isprintable()
        monkeypatch.setenv(_common.DEBUG_VARIABLE, "1")
        stack = run("verify", name, code=1).stderr
        assert "Traceback" in stack
        assert stack.replace("\n", "").isprintable()

    def test_texts_of_files_cannot_steer_the_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.save({**tiny_backbone().state_dict(), "a\x1b[31m[red]b": torch.zeros(2)}, "odd.pt")
        row = {"name": "a\x1b[2Jb", "sampler": {}, "guarantee": "exact", "forwards": 1.0, "seconds": {"1": 1.0}}
        where = {"date": "d", "hardware": "h", "vargen": "0", "torch": "0"}
        bench = {"model": "m", "num_images": 0, "repeats": 1, "floor": None, "skipped": {}, "rows": [row]}
        Path("bench.json").write_text(json.dumps({**bench, "environment": where}))
        monkeypatch.setattr("vargen.cli.models._card", lambda _name: "# card\x1b[2J\n")
        for arguments, shown in (
            (["verify", "odd.pt"], r"a\x1b[31m[red]b"),
            (["bench", "--table", "bench.json"], r"a\x1b[2Jb"),
            (["models", "any"], "# card\\x1b[2J"),
        ):
            output = CliRunner().invoke(app, arguments).output
            assert shown in output, (arguments, output)
            assert output.replace("\n", "").isprintable()

    def test_pages_and_progress_cannot_steer_the_terminal(self, capsys: pytest.CaptureFixture[str]) -> None:
        _common.show_markdown("# title\x1b[2J\n\nnothing\u202e")
        _common.say("a\x1b\nb")
        text = capsys.readouterr().out
        assert r"title\x1b[2J" in text
        assert r"nothing\u202e" in text
        assert text.endswith("a\\x1b\nb\n")

    def test_file_too_large_is_named(self, model: str) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        for arguments, file in ((["-o", "big.png"], "big.png"), (["--separate", "-o", "d"], "d/0000-seed5.png")):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
            try:
                (line,) = generate(model, *arguments, code=2).stderr.splitlines()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert line.startswith(f"error: cannot write {file}: File too large")
        assert list(Path().iterdir()) == []

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
