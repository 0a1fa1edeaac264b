"""Wrapped models as people use them: pipelines, processors, wrappers of other libraries, bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from tests.adapter_cases import HF, case
from vargen import ImagePipeline, wrap
from vargen.adapters.families.emu3_5 import emu35_config, load_emu35
from vargen.adapters.tiny import tiny_janus
from vargen.samplers.base import known_samplers
from vargen.samplers.window.jacobi import SpeculativeJacobiSampler
from vargen.samplers.window.next_token import NextTokenSampler

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ["a red fox", "the golden castle on a mountain"]


@pytest.fixture(scope="module")
def tiny():
    return tiny_janus()


@pytest.fixture(scope="module")
def pipe(tiny):
    made = ImagePipeline.from_transformers(*tiny)
    made.set_progress_bar_config(disable=True)
    return made


def test_pipeline_draws_the_codes_of_next_token_sampling(pipe, tiny) -> None:
    out = pipe(PROMPTS, num_images_per_prompt=2, seed=3, window=4)
    assert [image.size for image in out.images] == [(16, 16)] * 4
    expected = pipe(PROMPTS, num_images_per_prompt=2, seed=3, window=1, output_type="codes")
    assert torch.equal(out.codes, expected.codes)
    assert not any(module.training for module in tiny[0].modules())  # a decoder left in training mode would change


def test_pipeline_reads_the_models_own_settings(pipe) -> None:
    assert pipe.sampler.guidance_scale == 5.0
    assert pipe.sampler.top_k == 0  # not the 50 that generate would fill in


def test_greedy_pipeline_is_generate(pipe, tiny) -> None:
    model, processor = tiny
    chats = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in PROMPTS]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    inputs = processor(text=texts, generation_mode="image", padding=True, return_tensors="pt")
    expected = model.generate(**inputs, generation_mode="image", do_sample=False, guidance_scale=5.0)
    out = pipe(PROMPTS, temperature=0.0, seed=0)
    assert torch.equal(out.codes, expected)
    pixels = (127.5 * model.decode_image_tokens(expected).detach() + 127.5).clamp(
        0, 255
    )  # as the processor's postprocess
    for ours, theirs in zip(out.images, pixels, strict=True):
        assert float((torch.from_numpy(np.array(ours)).float() - theirs).abs().max()) <= 1  # they truncate to 8 bits


def test_every_window_sampler_fits() -> None:
    offered = case("emu3").backbone.features
    fitting = {sampler.__name__ for sampler in known_samplers() if sampler.required_features <= offered}
    assert {"NextTokenSampler", "SpeculativeJacobiSampler", "ZipARSampler"} <= fitting


@pytest.mark.parametrize("carry", ["maximal", "independent"])
def test_other_carries_run_over_forced_slots(carry: str) -> None:
    c = case("lumina")
    sampler = SpeculativeJacobiSampler(window=6, carry=carry, guidance_scale=3.0, temperature=0.5)
    out = sampler.sample(c.backbone, c.prompts, seeds=[0, 1])
    assert out.codes.shape == (2, 16)
    assert bool(((out.codes >= 0) & (out.codes < 32)).all())
    assert out.stats.num_forwards < c.backbone.layout().run_length + 1


def test_grouped_acceptance_reads_the_models_codebook() -> None:
    found = {sampler.__name__: sampler for sampler in known_samplers()}
    c = case("emu3")
    sampler = found["GroupedSpeculativeSampler"](window=6, guidance_scale=3.0)
    out = sampler.sample(c.backbone, c.prompts, seeds=[0, 1], tokenizer=c.backbone.pixels())
    assert bool(((out.codes >= 0) & (out.codes < 32)).all())
    assert out.stats.guarantee == "heuristic"


@pytest.mark.slow
@pytest.mark.parametrize("script", ["janus_pro", "emu3", "lumina_mgpt", "glm_image", "emu3_5"])
def test_examples_say_what_to_download(script: str) -> None:
    """Without weights: the memory estimate, then one line that names the repository and its size."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, f"examples/{script}.py", "--model", "nobody/nothing"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "GB to download" in done.stdout
    assert "licence" in done.stdout
    assert done.stderr.strip().splitlines()[-1].startswith("no weights of nobody/nothing on this machine: run `hf")


def test_glm_prior_tokens_are_the_references() -> None:
    from tests.golden_files import load_file

    io, c = load_file(HF / "glm_image" / "io.safetensors"), case("glm_image")
    assert torch.equal(c.backbone.prior_token_ids(c.greedy[1.0]), io["prior_token_ids"])
    packed = c.backbone.prepare(c.prompts)
    slots = torch.arange(16)[None].expand(2, -1)
    positions = c.backbone.stream_positions(slots, packed.lengths, c.backbone.layout())
    assert torch.equal(positions, io["decode.position_ids"])


def test_emu35_checkpoint_loads_without_its_remote_code(tmp_path) -> None:
    model = case("emu3_5").backbone.model
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    theta = stored.pop("rope_parameters")["rope_theta"]
    stored |= {"rope_theta": theta, "model_type": "Emu3", "architectures": ["Emu3ForCausalLM"], "auto_map": {"a": "b"}}
    path.write_text(json.dumps(stored))
    loaded = load_emu35(tmp_path)
    assert isinstance(loaded, transformers.Qwen3ForCausalLM)
    ids = torch.tensor([[1, 20, 6, 14, 5]])
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, model(ids).logits)
    assert emu35_config({"rope_theta": 123.0}).rope_parameters["rope_theta"] == 123.0


BAD = {
    "no adapter for Linear": lambda: wrap(torch.nn.Linear(2, 2)),
    "say family='emu3.5'": lambda: wrap(case("emu3_5").backbone.model),
    "needs the model's processor": lambda: ImagePipeline.from_transformers(case("janus").backbone.model, None),
    "has no processor and so reads no text": lambda: case("janus").backbone.prepare("a fox"),
    "must end with the begin-of-image token 3": lambda: case("janus").backbone.prepare(torch.tensor([[1, 5]])),
    "input_ids must be in 0..95": lambda: case("janus").backbone.prepare(torch.tensor([[1, 99, 3]])),
    "input_ids must be integers": lambda: case("janus").backbone.prepare(torch.tensor([[1.0, 3.0]])),
    "must have the shape of input_ids": lambda: case("janus").backbone.prepare(
        (torch.tensor([[1, 3]]), torch.tensor([[1]]))
    ),
    "its attention_mask is 0 everywhere": lambda: case("janus").backbone.prepare(
        (torch.tensor([[1, 3]]), torch.tensor([[0, 0]]))
    ),
    "images of \\(4, 4\\) codes": lambda: case("janus").backbone.with_grid(2, 2),
    "the prompts ask for images of \\[2, 2\\]": lambda: case("emu3").backbone.prepare(
        case("emu3").prompts | {"image_sizes": [[2, 2]] * 2}
    ),
    "no unconditional branch": lambda: case("glm_image").backbone.prepare(
        case("glm_image").prompts, guidance_scale=2.0
    ),
    "no effect without guidance": lambda: case("emu3").backbone.prepare(
        case("emu3").prompts, negative=case("emu3").negative
    ),
    "layout must be 'fixed'": lambda: wrap(case("lumina").backbone.model, layout="raster"),
    "even sides": lambda: case("lumina").backbone.with_grid(3, 4),
    "an adapter has no weights of its own": lambda: case("janus").backbone.save_pretrained("x"),
    "codes must be in 0..63": lambda: case("janus").backbone.pixels().decode(torch.full((1, 4, 4), 64)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_clear_line(message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        BAD[message]()
    assert "\n" not in str(caught.value)


def test_training_mode_is_refused(tiny) -> None:
    model, processor = tiny_janus()
    backbone = wrap(model.train(), processor)
    with pytest.raises(ValueError, match="training mode"):
        NextTokenSampler().sample(backbone, PROMPTS, seeds=[0, 1])


def test_pipeline_without_a_pixel_decoder_says_so_before_any_work() -> None:
    backbone = case("glm_image").backbone
    pipe = ImagePipeline(tokenizer=None, backbone=backbone, sampler=NextTokenSampler())
    with pytest.raises(ValueError, match="use output_type='codes'"):
        pipe("a fox")
