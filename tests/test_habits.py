"""What users of diffusers and transformers write: it works, or one line says what to write instead (docs/habits.md)."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import vargen
from tests.tiny import tiny_backbone, tiny_hero_pipeline, tiny_pipeline, tiny_scale_pipeline
from vargen.cli.main import app
from vargen.pipelines.image import ImagePipeline
from vargen.pipelines.video_frames import save_video
from vargen.samplers.base import known_samplers
from vargen.validation.checks import nearest
from vargen.validation.other_words import INSTEAD

PAGE = Path(__file__).parents[1] / "docs" / "habits.md"
ROW = re.compile(r"^\| `(?P<code>[^`]+)`[^|]*\| (?P<what>works|error)(?:: `(?P<part>[^`]+)`)?", flags=re.MULTILINE)
ROWS = [match.groups() for match in ROW.finditer(PAGE.read_text())]


def cutoff(pipe: Any, step: int, time: int, tensors: dict[str, Any]) -> dict[str, Any]:
    """As diffusers' SDCFGCutoffCallback does."""
    pipe._guidance_scale = 0.0
    return tensors


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A saved pipeline, and folders in other layouts."""
    base = tmp_path_factory.mktemp("habits")
    tiny_pipeline().save_pretrained(base / "pipeline")
    (base / "original").mkdir()
    torch.save(tiny_backbone().state_dict(), base / "original" / "c2i_B_256.pt")
    (base / "janus").mkdir()
    (base / "janus" / "config.json").write_text(json.dumps({"model_type": "janus"}))
    save_file({"a": torch.ones(1)}, base / "janus" / "model.safetensors")
    return {
        "folder": str(base / "pipeline"),
        "original_folder": str(base / "original"),
        "transformers_folder": str(base / "janus"),
    }


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.fixture
def names(folders: dict[str, str]) -> dict[str, Any]:
    """What a row may use."""
    public = {name: getattr(vargen, name) for name in vargen.__all__}
    made = {"pipe": tiny_pipeline(), "scale": tiny_scale_pipeline(), "cutoff": cutoff}
    outside = {"np": np, "Image": Image, "torch": torch, "F": F, "vargen": vargen, "diffusers": diffusers}
    return public | outside | {"DiffusionPipeline": DiffusionPipeline} | folders | made


def test_every_row_of_the_page_is_run() -> None:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert len(ROWS) == len(lines) > 20
    assert all(part for _, what, part in ROWS if what == "error")


@pytest.mark.parametrize(("code", "what", "part"), ROWS, ids=[row[0] for row in ROWS])
@pytest.mark.usefixtures("no_network")
def test_habit(code: str, what: str, part: str | None, names: dict[str, Any]) -> None:
    if what == "works":
        exec(code, names)
        return
    with pytest.raises(ValueError, match=re.escape(part or "")) as caught:
        exec(code, names)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 450


class TestPipelines:
    def test_from_pipe_shares_components_drafters_and_draws_the_same(self) -> None:
        pipe = tiny_pipeline(eagle=tiny_backbone())
        other = ImagePipeline.from_pipe(pipe)
        assert other.backbone is pipe.backbone
        assert other.drafters == ["eagle"]
        assert torch.equal(other(class_labels=1, seed=3).codes, pipe(class_labels=1, seed=3).codes)
        assert ImagePipeline.from_pipe(pipe, dtype=torch.bfloat16).backbone.dtype == torch.bfloat16
        for call, part in [
            (lambda: ImagePipeline.from_pipe(SimpleNamespace()), "a pipeline of vargen, got SimpleNamespace"),
            (lambda: ImagePipeline.from_pipe(pipe, samplr=1), "'samplr'"),
            (lambda: vargen.VideoPipeline.from_pipe(pipe), "a VideoPipeline needs a video tokenizer"),
        ]:
            with pytest.raises(ValueError, match=part):
                call()

    def test_diffusers_loads_a_folder_with_its_drafters_and_draws_the_same(self, tmp_path: Path) -> None:
        pipe = tiny_pipeline(eagle=tiny_backbone())
        pipe.save_pretrained(tmp_path / "pipe")
        loaded = DiffusionPipeline.from_pretrained(tmp_path / "pipe")
        assert type(loaded) is ImagePipeline
        assert loaded.drafters == ["eagle"]
        assert torch.equal(loaded(class_labels=1, seed=3).codes, pipe(class_labels=1, seed=3).codes)

    def test_diffusers_imports_nothing_that_a_folder_names(self, tmp_path: Path) -> None:
        tiny_pipeline().save_pretrained(tmp_path / "pipe")
        index = tmp_path / "pipe" / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"tokenizer": ["turtle", "Turtle"]}))
        with pytest.raises(ValueError, match="turtle"):
            DiffusionPipeline.from_pretrained(tmp_path / "pipe")

    def test_save_and_upload_after_from_original_lose_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given = {"grid_size": 4, "num_heads": 2, "condition_rope": "identity"}
        backbone = vargen.LlamaGenTransformer.from_original(tiny_backbone().state_dict(), **given)
        pipe = tiny_pipeline(backbone=backbone, eagle=tiny_backbone())
        expected = pipe(class_labels=1, seed=3).codes
        pipe.save_pretrained(tmp_path / "saved")
        assert torch.equal(ImagePipeline.from_pretrained(tmp_path / "saved")(class_labels=1, seed=3).codes, expected)

        uploaded: list[set[str]] = []

        def upload(self: Any, folder: Any, *_: Any, **__: Any) -> None:
            uploaded.append({str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()})

        monkeypatch.setattr("diffusers.utils.PushToHubMixin._upload_folder", upload)
        for module in ("diffusers.pipelines.pipeline_utils", "diffusers.utils.hub_utils"):
            monkeypatch.setattr(f"{module}.create_repo", lambda *_, **__: SimpleNamespace(repo_id="me/x"))
        cards = "load_or_create_model_card", lambda *_, **__: SimpleNamespace(save=lambda path: None, data=None)
        for module in ("diffusers.pipelines.pipeline_utils", "diffusers.utils.hub_utils"):
            monkeypatch.setattr(f"{module}.{cards[0]}", cards[1])
            monkeypatch.setattr(f"{module}.populate_model_card", lambda card, **_: card, raising=False)
        pipe.push_to_hub("me/x")
        pipe.save_pretrained(tmp_path / "again", push_to_hub=True, repo_id="me/x")
        for files in uploaded:
            assert {"model_index.json", "drafters/eagle/config.json", "backbone/config.json"} <= files
        tiny_hero_pipeline().conditioner.push_to_hub("me/x")
        assert len(uploaded) == 3
        assert "conditioner_config.json" in uploaded[-1]

    def test_a_wrapped_model_says_how_it_is_saved(self, tmp_path: Path) -> None:
        pytest.importorskip("transformers")
        from vargen.adapters.tiny import tiny_janus

        pipe = ImagePipeline.from_transformers(*tiny_janus())
        for call in (lambda: pipe.save_pretrained(tmp_path / "pipe"), lambda: pipe.push_to_hub("me/x")):
            with pytest.raises(ValueError, match=r"model\.save_pretrained\(folder\)") as caught:
                call()
            assert "\n" not in str(caught.value)
        assert not (tmp_path / "pipe").exists()
        with pytest.raises(ValueError, match="push_to_hub"):
            pipe.backbone.push_to_hub("me/x")

    def test_a_component_of_a_shipped_model_that_is_shared_is_found(self) -> None:
        shared = vargen.VQTokenizer.from_pretrained("heroes32-nar", subfolder="tokenizer")
        own = vargen.VQTokenizer.from_pretrained("heroes32-llamagen", subfolder="tokenizer")
        assert torch.equal(shared.codebook, own.codebook)
        assert vargen.AttributeConditioner.from_pretrained("heroes32-nar").config.vocabulary == "heroes"

    def test_a_repository_without_an_index_names_the_calls(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def absent(*_: Any, **__: Any) -> str:
            raise OSError("404: no file named model_index.json\nsee https://...")

        monkeypatch.setattr(ImagePipeline, "download", absent)
        with pytest.raises(ValueError, match="from_transformers") as caught:
            ImagePipeline.from_pretrained("deepseek-community/Janus-Pro-1B")
        assert "\n" not in str(caught.value)


class TestSamplers:
    @pytest.mark.parametrize("one", known_samplers(), ids=lambda kind: kind.__name__)
    def test_every_sampler_becomes_every_other(self, one: Any) -> None:
        for other in known_samplers():
            codes = not {one, other} & {kind for kind in known_samplers() if "continuous" in kind.required_features}
            for start in (
                one(),
                one(guidance_scale=2.5, temperature=0.5, **({"top_k": 3, "top_p": 0.5} if codes else {})),
            ):
                swapped = other.from_config(start.config)
                for name in ("guidance_scale", "temperature", "top_k", "top_p"):
                    assert getattr(swapped, name) == getattr(start, name)

    def test_compatibles_are_those_for_the_same_backbones(self) -> None:
        names = {kind.__name__ for kind in vargen.NextTokenSampler().compatibles}
        assert {"NextTokenSampler", "SpeculativeJacobiSampler", "LanternSampler"} <= names
        assert "NextScaleSampler" not in names

    def test_a_config_is_frozen_and_can_be_copied(self) -> None:
        import copy
        import pickle

        sampler = vargen.SpeculativeJacobiSampler(window=5)
        config = sampler.config
        changes = [
            lambda: config.__setitem__("window", 9),
            lambda: config.pop("window"),
            lambda: config.update(window=9),
            lambda: config.clear(),
            lambda: config.__delitem__("window"),
            lambda: setattr(config, "window", 9),
        ]
        for change in changes:
            with pytest.raises(ValueError, match="cannot be changed"):
                change()
        assert config["window"] == config.window == 5
        for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), config.copy(), config | {}):
            assert dict(again) == dict(config)
        assert vargen.SpeculativeJacobiSampler.from_config(config | {"window": 7}).window == 7
        assert json.loads(sampler.to_json_string())["window"] == 5


class TestNegative:
    """``negative=`` of ``sample``: what guidance leads away from."""

    def test_the_second_branch_reads_it(self) -> None:
        backbone, sampler = tiny_backbone(), vargen.NextTokenSampler(guidance_scale=3.0)
        call = {"seeds": [3, 4]}
        plain = sampler.sample(backbone, torch.tensor([1, 2]), **call).codes
        away = sampler.sample(backbone, torch.tensor([1, 2]), negative=torch.tensor([5, 6]), **call).codes
        assert not torch.equal(plain, away)
        with_itself = sampler.sample(backbone, torch.tensor([1, 2]), negative=torch.tensor([1, 2]), **call).codes
        unguided = vargen.NextTokenSampler().sample(backbone, torch.tensor([1, 2]), **call).codes
        assert torch.equal(with_itself, unguided)  # u + s (c - u) where u = c
        jacobi = vargen.SpeculativeJacobiSampler(guidance_scale=3.0, window=4)
        assert torch.equal(
            jacobi.sample(backbone, torch.tensor([1, 2]), negative=torch.tensor([5, 6]), **call).codes, away
        )

    def test_where_it_means_nothing_it_is_refused(self) -> None:
        backbone, one = tiny_backbone(), torch.tensor([1])
        with pytest.raises(ValueError, match="no effect without guidance"):
            vargen.NextTokenSampler().sample(backbone, one, seeds=[1], negative=one)
        with pytest.raises(ValueError, match="as many rows"):
            vargen.NextTokenSampler(guidance_scale=2).sample(backbone, one, seeds=[1], negative=torch.tensor([1, 2]))
        pipe = tiny_scale_pipeline()
        call = {"seeds": [1], "tokenizer": pipe.tokenizer, "drafter": pipe.backbone, "negative": one}
        with pytest.raises(ValueError, match="negative is for one model"):
            vargen.NextScaleSampler(guidance_scale=2, refine_scale=1).sample(pipe.backbone, one, **call)


class TestPaths:
    def test_a_tilde_is_the_home_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("USERPROFILE", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        pipe = tiny_pipeline()
        pipe.save_pretrained("~/pipe")
        pipe.backbone.save_pretrained("~/backbone")
        torch.save(pipe.backbone.state_dict(), tmp_path / "x.pt")
        assert (tmp_path / "pipe" / "model_index.json").is_file()
        assert ImagePipeline.from_pretrained("~/pipe").config.sampler[1] == "NextTokenSampler"
        assert vargen.LlamaGenTransformer.from_pretrained("~/backbone").grid_size == (4, 4)
        assert vargen.load_original("~/x.pt")
        preview = vargen.LivePreview(on_frame=lambda frame: None)
        pipe(class_labels=1, callback_on_step_end=preview)
        preview.save("~/growing.gif")
        assert (tmp_path / "growing.gif").is_file()
        assert not (tmp_path / "~").exists()

    def test_the_command_reads_a_tilde_too(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("USERPROFILE", str(tmp_path))
        tiny_pipeline().save_pretrained("~/pipe")
        run = CliRunner().invoke(app, ["generate", "-m", "~/pipe", "-c", "1", "--output=~/out.png"])
        assert run.exit_code == 0, run.output
        assert (tmp_path / "out.png").is_file()


class TestCommand:
    @pytest.mark.parametrize(
        ("options", "part"),
        [
            (["--set", "temperature=0.9"], None),
            (["--set", "temperature=0.9", "--temperature", "0.8"], "given twice"),
            (["--set", "seed=3"], "has no setting 'seed'"),
            (["--set", "prompt=elf"], "has no setting 'prompt'"),
            (["--set", "batch_size=1"], "has no setting 'batch_size'"),
        ],
    )
    def test_settings_with_an_option_of_their_own(
        self, folders: dict[str, str], tmp_path: Path, options: list[str], part: str | None
    ) -> None:
        given = ["generate", "-m", folders["folder"], "-c", "1", "-o", str(tmp_path / "out.png"), *options]
        run = CliRunner().invoke(app, given)
        assert run.exit_code == (0 if part is None else 2), run.output
        assert part is None or part in run.output
        assert "internal error" not in run.output


def test_a_cast_says_nothing_about_modules_that_stay_in_float32(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("diffusers.models.modeling_utils")
    backbone = tiny_backbone()
    logger.addHandler(caplog.handler)
    try:
        backbone.to(torch.bfloat16)
        assert not caplog.records
        backbone._keep_in_fp32_modules = ["norm"]
        backbone.to(torch.float32)
        assert "['norm']" in caplog.text  # a notice that says something passes
    finally:
        logger.removeHandler(caplog.handler)


def test_numpy_masks_and_images_mean_what_tensors_mean() -> None:
    pipe = tiny_scale_pipeline()
    side = pipe.tokenizer.scales[-1][0] * pipe.tokenizer.downsample
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    mask = np.zeros((side, side), bool)
    mask[: side // 2] = True
    call = {"class_labels": 1, "seed": 3}
    tensor = torch.from_numpy(image / 255).float().movedim(-1, 0)
    expected = pipe(image=tensor, mask_image=torch.from_numpy(mask), **call).codes
    masks = (mask, mask.astype(np.uint8) * 255, mask.astype(np.uint8), mask.astype(np.float64), mask[..., None])
    for given in masks:
        for picture in (image, image / 255, image[None], [image]):
            found = pipe(image=picture, mask_image=given, **call).codes
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_seeds_of_numpy_and_torch_mean_what_lists_mean() -> None:
    pipe = tiny_pipeline()
    call = {"class_labels": [1, 2], "output_type": "codes"}
    expected = pipe(seed=[5, 9], **call)
    for seeds in (np.array([5, 9]), np.array([5, 9], np.uint64), torch.tensor([5, 9]), range(5, 10, 4)):
        found = pipe(seed=seeds, **call)
        assert found.seeds == [5, 9]
        assert torch.equal(found.codes, expected.codes)
    for wrong in (np.array([0.5, 1.5]), np.zeros((2, 1), int), torch.ones(3, dtype=torch.int64), range(10**12)):
        with pytest.raises(ValueError, match="seed"):
            pipe(seed=wrong, **call)
    labels = pipe(class_labels=np.array([1, 2]), seed=5)
    assert torch.equal(labels.codes, pipe(class_labels=[1, 2], seed=5).codes)
    for wrong in (np.array([0.5]), np.zeros((2, 2), int)):
        with pytest.raises(ValueError, match="class_labels must be integers"):
            pipe(class_labels=wrong)


@pytest.mark.parametrize(("given", "part"), [(0, "at least|in 1"), (4.0, "one number"), (True, "one number")])
def test_a_grid_of_one_number_is_a_square(given: Any, part: str) -> None:
    assert tiny_backbone(grid_size=np.int64(4)).grid_size == (4, 4)
    with pytest.raises(ValueError, match=part):
        tiny_backbone(grid_size=given)


class TestNames:
    @pytest.mark.parametrize(
        ("word", "near"),
        [("tempreature", "temperature"), ("topk", "top_k"), ("windw", "window"), ("window_size", "window"), ("temp", "temperature"),
         ("Window", "window"), ("height", None), ("foo", None), ("x", None), ("resolution", None), (3, None)],
    )  # fmt: skip
    def test_only_near_names_are_suggested(self, word: Any, near: str | None) -> None:
        assert nearest(word, vargen.SpeculativeJacobiSampler.setting_names()) == near

    def test_what_other_libraries_call_it_is_no_setting_of_ours_where_it_is_explained(self) -> None:
        for kind in known_samplers():
            for word in set(INSTEAD) - set(kind.setting_names()):
                with pytest.raises(ValueError, match=re.escape(INSTEAD[word])) as caught:
                    kind().replace(**{word: 1})
                assert "did you mean" not in str(caught.value)
                assert len(str(caught.value)) < 250

    def test_a_word_of_a_choice_is_suggested_only_if_near(self) -> None:
        with pytest.raises(ValueError, match="did you mean 'uniform'") as near:
            vargen.SpeculativeJacobiSampler(init="unifrom")
        with pytest.raises(ValueError, match="init must be one of") as far:
            vargen.SpeculativeJacobiSampler(init="xyz")
        assert "did you mean" in str(near.value)
        assert "did you mean" not in str(far.value)


@pytest.mark.parametrize(
    ("count", "fps", "whole"), [(17, 60, 28), (17, 50, 34), (5, 8, 62), (30, 100, 30), (3, 7, 43)]
)
def test_a_gif_lasts_as_long_as_its_frames(tmp_path: Path, count: int, fps: int, whole: int) -> None:
    frames = [Image.new("RGB", (8, 8), (9 * index, 0, 255 - 9 * index)) for index in range(count)]
    save_video(frames, tmp_path / "clip.gif", fps=fps)
    with Image.open(tmp_path / "clip.gif") as clip:
        times = []
        for index in range(clip.n_frames):
            clip.seek(index)
            times.append(clip.info["duration"])
    assert len(times) == count
    assert sum(times) == 10 * whole
    assert max(times) - min(times) <= 10
