"""Janus and Emu3 in the layout of their authors, against numbers of the official code (tests/golden/{janus,emu3}_original)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden_files import load_file
from vargen import wrap
from vargen.adapters.families import emu3_layout
from vargen.adapters.families.emu3_checkpoints import load_emu3
from vargen.adapters.families.janus_checkpoints import load_janus
from vargen.samplers.window.jacobi import SpeculativeJacobiSampler
from vargen.samplers.window.next_token import NextTokenSampler

GOLDEN = Path(__file__).parent / "golden"
JANUS, EMU3 = GOLDEN / "janus_original", GOLDEN / "emu3_original"
IDS = {"bos": 0, "pad": 2, "begin_of_image": 3, "image_placeholder": 5}
HEADS = {"vision_config": {"num_attention_heads": 2}}  # the tiny tower is none of the published ones
CLOSE = {"atol": 1e-4, "rtol": 0.0}


@cache
def janus_weights() -> dict[str, Tensor]:
    return load_file(JANUS / "model.safetensors")


@cache
def emu3_weights() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    vision = load_file(EMU3 / "vision_tokenizer" / "model.safetensors")
    sides = [f"{side}.time_res_stack.0.norm{i}.num_batches_tracked" for side in ("encoder", "decoder") for i in (1, 2)]
    return load_file(EMU3 / "model.safetensors"), vision | {name: torch.tensor(0) for name in sides}


@cache
def janus() -> Any:
    language = json.loads((JANUS / "config.json").read_text())["language_config"]
    config = HEADS | {"text_config": {"num_attention_heads": language["num_attention_heads"]}}
    return wrap(load_janus(dict(janus_weights()), config=config | {}, token_ids=IDS))


@cache
def emu3() -> Any:
    language, vision = emu3_weights()
    stored = json.loads((EMU3 / "config.json").read_text())
    ids = {name: stored[name] for name, _ in emu3_layout.TOKENS.values()}
    config = ids | {name: stored[name] for name in ("num_attention_heads", "num_key_value_heads")}
    return wrap(load_emu3(dict(language), dict(vision), config=config), grid_size=(4, 5))


def sample(backbone: Any, prompts: Any, window: int, **settings: Any) -> Any:
    made = NextTokenSampler(**settings) if window == 1 else SpeculativeJacobiSampler(window=window, **settings)
    rows = len(prompts["input_ids"])
    return made.sample(backbone, prompts, seeds=list(range(rows)), tokenizer=backbone.pixels())


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("scale", [5.0, 2.0, 1.0])
def test_janus_draws_the_official_tokens_and_pixels(scale: float, window: int) -> None:
    io, backbone = load_file(JANUS / "io.safetensors"), janus()
    prompts = {"input_ids": io["prompt_ids"][None]}
    out = sample(backbone, prompts, window, guidance_scale=scale, temperature=0.0)
    name = f"greedy.cfg{scale:g}"
    assert torch.equal(out.codes, io[f"{name}.tokens"])
    torch.testing.assert_close(backbone.pixels().decode(out.codes.view(1, 4, 4)), io[f"{name}.pixels"], **CLOSE)


def test_janus_logits_are_the_official_ones() -> None:
    io, backbone = load_file(JANUS / "io.safetensors"), janus()
    tokens = io["forced.tokens"]
    packed = backbone.prepare({"input_ids": io["prompt_ids"][None].repeat(2, 1)}, guidance_scale=5.0)
    assert packed.ids[2].tolist() == io["uncond_ids"].tolist()
    session, first = backbone.open(packed, max_window=16)
    rest = backbone.step(session, tokens[:, :-1])
    logits = torch.cat([first.logits, rest.logits], dim=2)
    torch.testing.assert_close(logits, torch.stack([io["forced.cond_logits"], io["forced.uncond_logits"]]), **CLOSE)


def test_janus_reads_pictures_as_the_official_code_does() -> None:
    io, model = load_file(JANUS / "io.safetensors"), janus().model
    with torch.no_grad():
        vision = model.model.vision_model(io["und.pixel_values"][0]).last_hidden_state
        torch.testing.assert_close(vision, io["und.vision_features"], **CLOSE)
        torch.testing.assert_close(model.model.aligner(vision), io["und.aligned"], **CLOSE)
        logits = model(input_ids=io["und.input_ids"], pixel_values=io["und.pixel_values"][0]).logits[:, -1]
    torch.testing.assert_close(logits, io["und.lm_logits_last"], **CLOSE)


def test_a_tied_text_head_would_draw_other_tokens() -> None:
    """transformers' class ties by default; nothing would fail, and the images would be wrong."""
    from transformers import JanusConfig, JanusForConditionalGeneration

    io, backbone = load_file(JANUS / "io.safetensors"), janus()
    model = backbone.model
    assert not model.config.tie_word_embeddings
    embedding = janus_weights()["language_model.model.embed_tokens.weight"]
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert torch.equal(model.lm_head.weight, janus_weights()["language_model.lm_head.weight"])
    settings = model.config.to_dict()
    for part in (settings, settings["text_config"]):
        part.pop("tie_word_embeddings", None)  # as if nobody had thought of it
    tied = JanusForConditionalGeneration(JanusConfig(**settings)).eval()
    tied.tie_weights()
    tied.load_state_dict(model.state_dict())
    tied.generation_config = model.generation_config
    prompts = {"input_ids": io["prompt_ids"][None]}
    codes = sample(wrap(tied), prompts, 1, guidance_scale=5.0, temperature=0.0).codes
    assert not torch.equal(codes, io["greedy.cfg5.tokens"])
    with pytest.raises(ValueError, match="tie_word_embeddings must be False"):
        load_janus(dict(janus_weights()), config=HEADS | {"tie_word_embeddings": True}, token_ids=IDS)


@pytest.mark.parametrize("window", [1, 6])
@pytest.mark.parametrize("scale", [3.0, 1.5])
def test_emu3_draws_the_official_streams_and_pixels(scale: float, window: int) -> None:
    io, backbone = load_file(EMU3 / "io.safetensors"), emu3()
    prompts = {"input_ids": io["prompt_ids"], "attention_mask": io["attention_mask"]}
    rows = backbone.prepare(prompts, guidance_scale=scale, negative={"input_ids": io["negative_ids"]})
    sampler = NextTokenSampler if window == 1 else SpeculativeJacobiSampler
    settings = {} if window == 1 else {"window": window}
    negative = Negative(backbone, io["negative_ids"])
    made = sampler(guidance_scale=scale, temperature=0.0, **settings)
    out = made.sample(negative, prompts, seeds=[0, 1], tokenizer=backbone.pixels())
    name = f"greedy.cfg{scale:g}"
    assert rows.branches == 2
    assert torch.equal(backbone.to_stream(out.codes), io[f"{name}.stream"])
    assert torch.equal(out.codes.view(2, 4, 5), io[f"{name}.codes"])
    torch.testing.assert_close(backbone.pixels().decode(out.codes.view(2, 4, 5)), io[f"{name}.pixels"], **CLOSE)


class Negative:
    """The backbone with the golden's negative prompt, which no processor wrote."""

    def __init__(self, backbone: Any, ids: Tensor) -> None:
        self.backbone, self.ids = backbone, ids

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backbone, name)

    def prepare(self, condition: Any, *, guidance_scale: Any) -> Any:
        return self.backbone.prepare(condition, guidance_scale=guidance_scale, negative={"input_ids": self.ids})


def test_emu3_logits_are_the_official_ones() -> None:
    io, backbone = load_file(EMU3 / "io.safetensors"), emu3()
    ids, layout = backbone.code_ids(), backbone.layout()
    codes = (io["forced.stream"][:, layout.forced < 0] - ids[0])[:, : backbone.num_codes]
    negative = {"input_ids": io["negative_ids"]}
    prompts = {"input_ids": io["prompt_ids"], "attention_mask": io["attention_mask"]}
    packed = backbone.prepare(prompts, guidance_scale=3.0, negative=negative)
    session, first = backbone.open(packed, max_window=layout.length)
    slots = torch.zeros(2, layout.run_length, dtype=torch.int64)
    slots[:, (layout.forced < 0)[: layout.run_length]] = codes[
        :, : int((layout.forced < 0)[: layout.run_length].sum())
    ]
    rest = backbone.step(session, slots)
    logits = torch.cat([first.logits, rest.logits], dim=2)[:, :, (layout.forced < 0)[: layout.run_length + 1]]
    expected = torch.stack([io["forced.cond_code_logits"], io["forced.uncond_code_logits"]])
    torch.testing.assert_close(logits, expected, **CLOSE)


def test_emu3_tokenizer_encodes_pictures_as_the_official_one() -> None:
    io, vq = load_file(EMU3 / "io.safetensors"), emu3().model.model.vqmodel
    with torch.no_grad():
        encoded = vq.encode(io["vq.image"], torch.tensor([[8, 10], [8, 10]]))
        found = encoded.image_tokens if hasattr(encoded, "image_tokens") else encoded
        assert torch.equal(torch.stack(list(found)), io["vq.codes"])
        torch.testing.assert_close(vq.decode(io["vq.codes"]), io["vq.reconstruction"], **CLOSE)
