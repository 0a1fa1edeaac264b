"""Bad input: one clear line, before any work, and nothing on disk is damaged."""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import (
    CODEBOOK_SIZE,
    GRID,
    NUM_CLASSES,
    tiny_backbone,
    tiny_hero_pipeline,
    tiny_pipeline,
    tiny_tokenizer,
)
from vargen.backbones.llamagen.model import LlamaGenTransformer
from vargen.checkpoints.verify import verify_checkpoint
from vargen.files import atomic_write
from vargen.images import from_pil
from vargen.pipelines.image import ImagePipeline
from vargen.registry import sampler_class, swap_sampler
from vargen.samplers.window.jacobi import SpeculativeJacobiSampler
from vargen.samplers.window.next_token import NextTokenSampler
from vargen.tokenizers.vq.model import VQTokenizer


def one_line(call: Callable[[], Any], *parts: str, error: type[Exception] = ValueError) -> str:
    """Run a call that must fail; return its message, which is one line and holds every part."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message, message
    assert len(message) < 400, message
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"
    return message


class Watched:
    """A tiny pipeline that counts what it does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **components: Any) -> None:
        self.pipe = tiny_pipeline(**components)
        self.work: list[str] = []
        for owner, name in ((self.pipe.backbone, "forward_items"), (self.pipe.tokenizer, "decode")):
            monkeypatch.setattr(owner, name, self._counted(name, getattr(owner, name)))

    def _counted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.work.append(name)
            return method(*args, **kwargs)

        return call


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


NAN, INF = math.nan, math.inf
# what the call gets -> what the message holds: the argument, the value, what is allowed
CALLS: tuple[tuple[dict[str, Any], tuple[str, ...]], ...] = (
    ({"class_labels": NUM_CLASSES}, ("class_labels", f"0..{NUM_CLASSES - 1}", "got 10")),
    ({"class_labels": [1, -1]}, ("class_labels", f"0..{NUM_CLASSES - 1}", "got -1")),
    ({"class_labels": 1.5}, ("class_labels", "1.5")),
    ({"class_labels": [1, 2.5]}, ("class_labels", "2.5")),
    ({"class_labels": True}, ("class_labels", "True")),
    ({"class_labels": []}, ("class_labels", "[]")),
    ({"class_labels": torch.tensor([1.0])}, ("class_labels", "float32")),
    ({"class_labels": torch.tensor([[1]])}, ("class_labels", "(1, 1)")),
    ({"class_labels": "cat"}, ("class_labels", "'cat'", "no conditioner")),
    ({"class_labels": None}, ("prompt or class_labels", "neither")),
    ({"prompt": "a cat"}, ("prompt or class_labels", "both")),
    ({"class_labels": None, "prompt": "a cat"}, ("no conditioner", "class_labels")),
    ({"class_labels": None, "prompt": ""}, ("prompt is empty",)),
    ({"class_labels": None, "prompt": ["a cat", "  "]}, ("prompt 1 of 2 is empty",)),
    ({"class_labels": None, "prompt": []}, ("empty list",)),
    ({"class_labels": None, "prompt": 7}, ("prompt", "string", "7")),
    ({"guidance_scale": -0.5}, ("guidance_scale", "at least 0", "-0.5")),
    ({"guidance_scale": NAN}, ("guidance_scale", "finite", "nan")),
    ({"guidance_scale": INF}, ("guidance_scale", "finite", "inf")),
    ({"guidance_scale": "3"}, ("guidance_scale", "'3'")),
    ({"temperature": -1.0}, ("temperature", "at least 0", "-1.0")),
    ({"temperature": NAN}, ("temperature", "finite", "nan")),
    ({"top_k": -1}, ("top_k", "at least 0", "-1")),
    ({"top_k": 2.5}, ("top_k", "integer", "2.5")),
    ({"top_k": CODEBOOK_SIZE + 1}, ("top_k", str(CODEBOOK_SIZE), str(CODEBOOK_SIZE + 1))),
    ({"top_p": 0.0}, ("top_p", "greater than 0", "at most 1", "0.0")),
    ({"top_p": 1.5}, ("top_p", "at most 1", "1.5")),
    ({"top_p": NAN}, ("top_p", "nan")),
    ({"num_images_per_prompt": 0}, ("num_images_per_prompt", "at least 1", "0")),
    ({"num_images_per_prompt": 1.0}, ("num_images_per_prompt", "integer", "1.0")),
    ({"batch_size": 0}, ("batch_size", "at least 1", "0")),
    ({"output_type": "jpeg"}, ("output_type", "'pil'", "'jpeg'")),
    ({"seed": 1, "generator": torch.Generator()}, ("seed or generator",)),
    ({"seed": 1.5}, ("seed", "integer", "1.5")),
    ({"seed": -1}, ("seed", "2**64", "-1")),
    ({"seed": 2**64}, ("seed", "2**64")),
    ({"seed": [1, 2]}, ("seed", "list of 2", "1 images")),
    ({"generator": [torch.Generator(), torch.Generator()]}, ("generator", "list of 2", "1 images")),
    ({"generator": 42}, ("generator", "torch.Generator", "int")),
    ({"generator": ["x"]}, ("generator", "torch.Generator", "str")),
    ({"callback_on_step_end": 3}, ("callback_on_step_end", "callable", "int")),
    ({"callback_on_step_end_tensor_inputs": ["latents"]}, ("tensor_inputs", "codes", "latents")),
    ({"windw": 3}, ("NextTokenSampler", "windw", "Settings: guidance_scale")),
    ({"temperatur": 3}, ("NextTokenSampler", "temperatur", "did you mean 'temperature'")),
    ({"num_inference_steps": 3}, ("no setting", "num_inference_steps", "num_steps")),
)


CALL_IDS = [f"{index}-{'+'.join(call)}" for index, (call, _) in enumerate(CALLS)]  # the same in every worker


@pytest.mark.parametrize(("call", "parts"), CALLS, ids=CALL_IDS)
def test_bad_argument_of_the_call(watched: Watched, call: dict[str, Any], parts: tuple[str, ...]) -> None:
    state = torch.get_rng_state()
    one_line(lambda: watched.pipe(**{"class_labels": 3, **call}), *parts)
    assert watched.work == []
    assert torch.equal(state, torch.get_rng_state())


PROMPTS: tuple[tuple[dict[str, Any], tuple[str, ...]], ...] = (
    ({"prompt": "deep elf with a purpel cloak"}, ("unknown word", "'purpel'", "'purple cloak'")),
    ({"prompt": ["minotaur", "xylophone"]}, ("unknown word", "'xylophone'")),
    ({"prompt": "a red cloak and a green cloak"}, ("two parts", "red cloak", "green cloak")),
    ({"prompt": "with and the"}, ("names no part",)),
    ({"prompt": " , "}, ("empty",)),
    ({"class_labels": 3}, ("prompt=",)),
)


@pytest.mark.parametrize(("call", "parts"), PROMPTS)
def test_prompt_that_the_conditioner_cannot_read(call: dict[str, Any], parts: tuple[str, ...]) -> None:
    pipe = tiny_hero_pipeline()
    pipe.backbone.forward_items = None  # nothing may run
    one_line(lambda: pipe(**call), *parts)


@pytest.mark.parametrize("window", [0, -3, 2.5, "4"])
def test_bad_window(monkeypatch: pytest.MonkeyPatch, window: Any) -> None:
    watched = Watched(monkeypatch, sampler=SpeculativeJacobiSampler(window=4))
    one_line(lambda: watched.pipe(class_labels=3, window=window), "window", "at least 1", repr(window))
    assert watched.work == []


@settings(max_examples=200, deadline=None)
@given(
    guidance_scale=st.floats() | st.integers() | st.text() | st.none(),
    temperature=st.floats() | st.booleans(),
    top_k=st.integers() | st.floats(),
    top_p=st.floats() | st.complex_numbers(),
)
def test_any_setting_is_taken_or_refused_in_one_line(**given_settings: Any) -> None:
    refusal = ""
    try:
        sampler = NextTokenSampler(**given_settings)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert "\n" not in refusal
        assert any(name in refusal for name in given_settings)
        return
    assert 0 <= sampler.guidance_scale < INF
    assert 0 <= sampler.temperature < INF
    assert sampler.top_k >= 0
    assert 0 < sampler.top_p <= 1


class TestNames:
    @pytest.mark.parametrize("name", ["heroes32-lamagen", "no such model", "x"])
    def test_unknown_model(self, name: str) -> None:
        one_line(lambda: ImagePipeline.from_pretrained(name), f"unknown model {name!r}")

    def test_nearest_model_is_shown(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "heroes32-llamagen").mkdir()
        (tmp_path / "heroes32-llamagen" / "model_index.json").write_text("{}")
        monkeypatch.setattr("vargen.validation.places.MODELS_FOLDER", tmp_path)
        one_line(lambda: ImagePipeline.from_pretrained("hero32-lamagen"), "did you mean heroes32-llamagen")

    def test_unknown_sampler(self) -> None:
        one_line(lambda: sampler_class("next-tokn"), "unknown sampler 'next-tokn'", "did you mean next-token")

    def test_sampler_that_does_not_fit(self, watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(watched.pipe.backbone, "features", frozenset({"free_order"}), raising=False)
        one_line(lambda: watched.pipe(class_labels=3), "NextTokenSampler", "window", "Samplers that fit")
        pipe = watched.pipe
        one_line(lambda: swap_sampler(object(), "next-token", pipe.backbone), "does not fit", "samplers that fit")
        assert watched.work == []


class TestComponents:
    def test_codebooks_of_different_sizes(self) -> None:
        one_line(lambda: tiny_pipeline(tokenizer=tiny_tokenizer(32)), "tokenizer and backbone", "32 and 64")

    def test_codebooks_of_different_sizes_after_a_swap(self, watched: Watched) -> None:
        watched.pipe.tokenizer = tiny_tokenizer(32)
        one_line(lambda: watched.pipe(class_labels=3), "tokenizer and backbone", "32 and 64")
        assert watched.work == []

    def test_drafter_with_another_codebook(self) -> None:
        one_line(lambda: tiny_pipeline(drafter=tiny_backbone(codebook_size=7)), "drafter and backbone", "7 and 64")

    def test_half_precision_on_the_cpu(self, watched: Watched) -> None:
        watched.pipe.backbone.half()
        one_line(lambda: watched.pipe(class_labels=3), "backbone", "float16", "CPU", "bfloat16")
        assert watched.work == []

    def test_logits_that_are_not_numbers(self) -> None:
        pipe = tiny_pipeline()
        with torch.no_grad():
            pipe.backbone.output.weight.fill_(NAN)
        one_line(lambda: pipe(class_labels=[3, 4], seed=0), "position 0", "image 0")

    def test_logits_that_forbid_every_code_at_a_later_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe = tiny_pipeline()
        step = pipe.backbone.step

        def poisoned(session: Any, codes: torch.Tensor, **kwargs: Any) -> Any:
            out = step(session, codes, **kwargs)
            if int(session.length[0]) == 4:
                out.logits[:, 1] = -INF
            return out

        monkeypatch.setattr(pipe.backbone, "step", poisoned)
        one_line(lambda: pipe(class_labels=[3, 4], seed=0), "position 5", "image 1")

    def test_out_of_memory_says_what_to_lower(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe = tiny_pipeline()

        def full(*_: Any, **__: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB.")

        monkeypatch.setattr(pipe.backbone, "open", full)
        call = lambda: pipe(class_labels=[1, 2, 3])  # noqa: E731
        one_line(call, "out of GPU memory", "batch_size below 3", error=torch.OutOfMemoryError)


class TestPixelsAndCodes:
    @pytest.mark.parametrize("code", [-1, CODEBOOK_SIZE, 10**9])
    def test_codes_outside_the_codebook(self, code: int) -> None:
        codes = torch.zeros(1, *GRID, dtype=torch.int64)
        codes[0, 1, 2] = code
        one_line(lambda: tiny_tokenizer().decode(codes), f"[0, {CODEBOOK_SIZE})", str(code))

    @pytest.mark.parametrize(
        ("images", "parts"),
        [
            (torch.zeros(1, 3, 9, 8), ("multiples of 2", "9x8")),
            (torch.zeros(1, 4, 8, 8), ("[B, 3, H, W]", "(1, 4, 8, 8)")),
            (torch.zeros(3, 8, 8), ("[B, 3, H, W]", "(3, 8, 8)")),
            (torch.full((1, 3, 8, 8), 255.0), ("[-1, 1]", "255")),
            (torch.full((1, 3, 8, 8), NAN), ("[-1, 1]", "NaN")),
            (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ("floating point", "uint8")),
        ],
        ids=["side", "channels", "dimensions", "range", "nan", "integers"],
    )
    def test_bad_image(self, images: torch.Tensor, parts: tuple[str, ...]) -> None:
        one_line(lambda: tiny_tokenizer().encode(images), *parts)

    def test_images_of_different_sizes(self) -> None:
        from PIL import Image

        pictures = [Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))]
        one_line(lambda: from_pil(pictures), "8x8", "9x8")


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.target),))


class TestCheckpoints:
    CONFIG = {"num_heads": 2, "grid_size": GRID}  # noqa: RUF012

    def load(self, checkpoint: Any) -> LlamaGenTransformer:
        return LlamaGenTransformer.from_original(checkpoint, **self.CONFIG)

    def test_missing_file(self, tmp_path: Path) -> None:
        one_line(lambda: self.load(tmp_path / "none.pt"), "no checkpoint file", "none.pt")

    def test_truncated_file(self, tmp_path: Path) -> None:
        path = tmp_path / "cut.pt"
        torch.save(tiny_backbone().state_dict(), path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        one_line(lambda: self.load(path), "cut.pt")

    def test_truncated_safetensors(self, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        path = tmp_path / "cut.safetensors"
        save_file(tiny_backbone().state_dict(), path)
        path.write_bytes(path.read_bytes()[:-100])
        one_line(lambda: self.load(path), "cut.safetensors")

    @pytest.mark.parametrize(
        "content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + bytes(100)], ids=["empty", "text", "png"]
    )
    def test_not_a_checkpoint(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "what.pt"
        path.write_bytes(content)
        one_line(lambda: self.load(path), "what.pt")

    @pytest.mark.parametrize("how", ["torch", "pickle"])
    def test_code_inside_is_refused_and_not_run(self, tmp_path: Path, how: str) -> None:
        path, target = tmp_path / "evil.pt", tmp_path / "harmed"
        if how == "torch":
            torch.save({"model": tiny_backbone().state_dict(), "args": Evil(target)}, path)
        else:
            path.write_bytes(pickle.dumps({"model": Evil(target)}))
        one_line(lambda: self.load(path), "evil.pt")
        one_line(lambda: verify_checkpoint(path), "evil.pt")
        assert not target.exists()

    def test_missing_and_extra_keys_are_named(self) -> None:
        state_dict = tiny_backbone().state_dict()
        state_dict["layers.1.attention.wo2.weight"] = state_dict.pop("layers.1.attention.wo.weight")
        one_line(lambda: self.load(state_dict), "layers.1.attention.wo.weight", "layers.1.attention.wo2.weight")

    def test_wrong_shape_shows_both(self) -> None:
        state_dict = tiny_backbone().state_dict()
        state_dict["layers.1.attention.wo.weight"] = torch.zeros(32, 31)
        one_line(lambda: self.load(state_dict), "layers.1.attention.wo.weight", "32, 31", "32, 32")

    def test_wrong_family_says_which_it_looks_like(self) -> None:
        one_line(lambda: self.load(tiny_tokenizer().state_dict()), "LlamaGen VQ tokenizer")
        one_line(lambda: VQTokenizer.from_original(tiny_backbone().state_dict()), "class-to-image transformer")

    def test_what_shapes_cannot_tell_is_asked_for(self) -> None:
        state_dict = tiny_backbone().state_dict()
        one_line(lambda: LlamaGenTransformer.from_original(state_dict, grid_size=GRID), "num_heads")
        one_line(lambda: LlamaGenTransformer.from_original(state_dict, num_heads=2), "grid_size")


class TestFolders:
    def saved(self, folder: Path) -> Path:
        tiny_pipeline().save_pretrained(folder)
        return folder

    def test_folder_without_an_index(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").touch()
        one_line(lambda: ImagePipeline.from_pretrained(tmp_path), "model_index.json", "notes.txt")

    def test_file_instead_of_a_folder(self, tmp_path: Path) -> None:
        path = tmp_path / "c2i_B_256.pt"
        path.touch()
        one_line(lambda: ImagePipeline.from_pretrained(path), "is a file", "vargen convert")

    @pytest.mark.parametrize("content", ["{", "[]", "{}", '{"a": 1}'])
    def test_damaged_index(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "model_index.json").write_text(content)
        one_line(lambda: ImagePipeline.from_pretrained(tmp_path), "model_index.json")

    def test_missing_component_folder(self, tmp_path: Path) -> None:
        (self.saved(tmp_path) / "sampler").rename(tmp_path / "away")
        one_line(lambda: ImagePipeline.from_pretrained(tmp_path), "'sampler'", "NextTokenSampler")

    def test_missing_weights(self, tmp_path: Path) -> None:
        next(self.saved(tmp_path).glob("backbone/*.safetensors")).unlink()
        one_line(lambda: ImagePipeline.from_pretrained(tmp_path), "backbone", "weights")

    def test_truncated_weights(self, tmp_path: Path) -> None:
        path = next(self.saved(tmp_path).glob("backbone/*.safetensors"))
        path.write_bytes(path.read_bytes()[:-50])
        one_line(lambda: ImagePipeline.from_pretrained(tmp_path), "backbone", "damaged")

    @pytest.mark.parametrize(
        ("entry", "parts"),
        [
            (["vargen", "QuantumTransformer"], ("QuantumTransformer", "newer")),
            (["my_models", "Thing"], ("my_models", "import my_models")),
        ],
    )
    def test_unknown_component_class(self, tmp_path: Path, entry: list[str], parts: tuple[str, ...]) -> None:
        path = self.saved(tmp_path) / "model_index.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "backbone": entry}))
        one_line(lambda: ImagePipeline.from_pretrained(tmp_path), *parts)

    def test_setting_unknown_to_the_sampler(self, tmp_path: Path) -> None:
        path = self.saved(tmp_path) / "sampler" / "sampler_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "top_kk": 3}))
        one_line(lambda: ImagePipeline.from_pretrained(tmp_path), "top_kk", "did you mean 'top_k'")


class TestWriting:
    def test_existing_file_is_kept(self, tmp_path: Path) -> None:
        path = tmp_path / "out.png"
        path.write_text("precious")

        def write() -> None:
            with atomic_write(path) as beside:
                beside.write_text("new")

        one_line(write, "out.png", "exists", "--overwrite")
        assert path.read_text() == "precious"

    def test_failure_while_writing_damages_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "out.png"
        path.write_text("precious")

        def write() -> None:
            with atomic_write(path, overwrite=True) as beside:
                beside.write_text("half")
                raise ValueError("disk full")

        one_line(write, "disk full")
        assert path.read_text() == "precious"
        assert list(tmp_path.iterdir()) == [path]

    def test_folder_that_does_not_exist(self, tmp_path: Path) -> None:
        one_line(lambda: atomic_write(tmp_path / "no" / "out.png").__enter__(), "folder", "does not exist")

    @pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
    def test_folder_without_permission(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        one_line(lambda: atomic_write(tmp_path / "out.png").__enter__(), "permission")
