"""Tiny models of every family with reference numbers of the library's own ``generate`` (tests/golden/hf)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.golden_files import load_file, unpacked
from vargen.adapters.wrap import wrap

HF = Path(__file__).parent / "golden" / "hf"


@dataclass
class Case:
    """One family (Chameleon: one layout) and what its adapter must reproduce."""

    backbone: Any
    prompts: dict[str, Tensor]
    greedy: dict[float, Tensor]  # guidance scale -> [B, N] codes
    logits4: dict[float, Tensor]  # guidance scale -> [G, B, 4, V], the first four codes
    forced: Tensor  # [B, N] codes
    forced_logits: Tensor  # [G, B, N, V]
    generate: Callable[[dict[str, Tensor], float], Tensor]  # the library's own greedy codes
    negative: Any = None
    pixels: dict[float, Tensor] | None = None  # [B, 3, H, W]
    streams: dict[float, Tensor] | None = None  # [B, S] token ids of ``generate``, where they are not the codes

    @property
    def scale(self) -> float:
        return max(self.greedy)


def read(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(HF / name / "io.safetensors"), json.loads((HF / name / "golden.json").read_text())


def load(name: str, class_name: str, **options: Any) -> Any:
    """The stored model; networks of pixels are not stored, so those of the library are drawn here."""
    torch.manual_seed(0)
    return getattr(transformers, class_name).from_pretrained(HF / name, **options).eval()


def janus(**options: Any) -> Case:
    io, meta = read("janus")
    model = load("janus", "JanusForConditionalGeneration", **options)
    backbone = wrap(model)
    scales = meta["guidance_scales"]
    with torch.no_grad():
        images = {s: model.decode_image_tokens(io[f"greedy.cfg{s:g}.tokens"]) for s in scales}

    def generate(prompts: dict[str, Tensor], scale: float) -> Tensor:
        inputs = {"inputs": prompts["input_ids"], "attention_mask": prompts["attention_mask"]}
        return model.generate(**inputs, generation_mode="image", do_sample=False, guidance_scale=scale)

    return Case(
        backbone=backbone,
        prompts={"input_ids": io["prompt_ids"], "attention_mask": io["attention_mask"]},
        greedy={s: io[f"greedy.cfg{s:g}.tokens"] for s in scales},
        logits4={s: pair(io, f"greedy.cfg{s:g}", "logits4") for s in scales},
        forced=io["forced.tokens"],
        forced_logits=pair(io, "forced", "logits"),
        generate=generate,
        pixels={s: image.permute(0, 3, 1, 2) for s, image in images.items()},
    )


def emu3(**options: Any) -> Case:
    io, meta = read("emu3")
    model = load("emu3", "Emu3ForConditionalGeneration", **options)
    h, w = meta["H"], meta["W"]
    backbone = wrap(model, grid_size=(h, w))
    ids = meta["tokens"]
    negative = {"input_ids": io["negative_ids"], "attention_mask": io["negative_attention_mask"]}
    visual = torch.arange(ids["visual_start"], ids["visual_start"] + backbone.codebook_size)

    def decoded(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return model.model.decode_image_tokens(tokens, h, w)

    tail = {h * (w + 1): ids["eof"], h * (w + 1) + 1: ids["eoi"], h * (w + 1) + 2: ids["eos"]}

    def generate(prompts: dict[str, Tensor], scale: float) -> Tensor:
        length = prompts["input_ids"].shape[1]

        def allowed(row: int, sequence: Tensor) -> list[int]:
            slot = len(sequence) - length
            forced = tail.get(slot, ids["eol"] if slot % (w + 1) == w else None)
            return visual.tolist() if forced is None else [forced]

        rows = [
            int((prompts["input_ids"][i] == io["prompt_ids"]).all(1).nonzero())
            for i in range(len(prompts["input_ids"]))
        ]
        guided = {
            "guidance_scale": scale,
            "negative_prompt_ids": io["negative_ids"][rows],
            "negative_prompt_attention_mask": io["negative_attention_mask"][rows],
        }
        sequences = model.generate(
            **prompts,
            **(guided if scale != 1 else {}),
            prefix_allowed_tokens_fn=allowed,
            do_sample=False,
            max_new_tokens=h * (w + 1) + 3,
        )
        return codes_of(backbone, sequences[:, length:])

    return Case(
        backbone=backbone,
        prompts={"input_ids": io["prompt_ids"], "attention_mask": io["attention_mask"]},
        greedy={s: codes_of(backbone, io[f"greedy.cfg{s:g}.tokens"]) for s in (3.0, 1.0)},
        logits4={3.0: pair(io, "greedy.cfg3", "logits4")[..., visual]},
        forced=codes_of(backbone, io["forced.tokens"]),
        forced_logits=pair(io, "forced", "logits")[:, :, free_of(backbone)][..., visual],
        generate=generate,
        negative=negative,
        pixels={s: decoded(io[f"greedy.cfg{s:g}.tokens"]) for s in (3.0, 1.0)},
        streams={s: io[f"greedy.cfg{s:g}.tokens"] for s in (3.0, 1.0)},
    )


def chameleon(form: str, **options: Any) -> Case:
    io, meta = read("chameleon")
    model = load("chameleon", "ChameleonForConditionalGeneration", **options)
    backbone = wrap(
        model, layout=form, grid_size=(4, 4), vq_decoder=unpacked(HF / "chameleon" / "vq_decoder.safetensors")
    )
    first, count = meta["tokens"]["image_start"], meta["tokens"]["n_image"]
    visual = torch.arange(first, first + count)

    def generate(prompts: dict[str, Tensor], scale: float) -> Tensor:
        """The stock class cannot: its ``generate`` sees no image token. The reference subclass, as its README says."""

        class WithImages(transformers.ChameleonForConditionalGeneration):
            def forward(self, *args: Any, logits_to_keep: int = 0, **kwargs: Any) -> Any:
                hidden = self.model(*args, **kwargs)
                logits = self.lm_head(hidden.last_hidden_state[:, -logits_to_keep:])
                return transformers.modeling_outputs.CausalLMOutputWithPast(
                    logits=logits, past_key_values=hidden.past_key_values
                )

        other = WithImages.from_pretrained(HF / "chameleon", **options).eval()
        length, layout = prompts["input_ids"].shape[1], backbone.layout()

        def allowed(row: int, sequence: Tensor) -> list[int]:
            forced = int(layout.forced[len(sequence) - length])
            return visual.tolist() if forced < 0 else [forced]

        negative = io[f"{form}.uncond_ids"][:1].expand(len(prompts["input_ids"]), -1)
        sequences = other.generate(
            **prompts,
            **({"guidance_scale": scale, "negative_prompt_ids": negative} if scale != 1 else {}),
            prefix_allowed_tokens_fn=allowed,
            do_sample=False,
            max_new_tokens=layout.length,
        )
        return codes_of(backbone, sequences[:, length:])

    return Case(
        backbone=backbone,
        prompts={"input_ids": io[f"{form}.prompt_ids"], "attention_mask": io[f"{form}.attention_mask"]},
        greedy={s: codes_of(backbone, io[f"{form}.greedy.cfg{s:g}.tokens"]) for s in (3.0, 1.0)},
        logits4={3.0: pair(io, f"{form}.greedy.cfg3", "logits4")[..., visual]},
        forced=codes_of(backbone, io[f"{form}.forced.tokens"]),
        forced_logits=pair(io, f"{form}.forced", "logits")[:, :, free_of(backbone)][..., visual],
        generate=generate,
        pixels={s: io[f"{form}.greedy.cfg{s:g}.pixels"] for s in (3.0, 1.0)},
        streams={s: io[f"{form}.greedy.cfg{s:g}.tokens"] for s in (3.0, 1.0)},
    )


def glm_image(**options: Any) -> Case:
    io, meta = read("glm_image")
    model = load("glm_image", "GlmImageForConditionalGeneration", **options)
    grid, preview = tuple(meta["large_grid"]), tuple(meta["preview_grid"])
    backbone = wrap(model, grid_size=grid, preview_size=preview)
    count = backbone.num_codes

    def generate(prompts: dict[str, Tensor], scale: float) -> Tensor:
        batch, length = prompts["input_ids"].shape
        sequences = model.generate(
            **{key: value for key, value in prompts.items() if key != "image_grid_thw"},
            image_grid_thw=io["image_grid_thw"][:2].repeat(batch, 1),
            images_per_sample=torch.full((batch,), 2),
            do_sample=False,
            max_new_tokens=count + 1,
            suppress_tokens=list(range(backbone.codebook_size, model.config.text_config.vision_vocab_size)),
        )
        return sequences[:, length : length + count]

    return Case(
        backbone=backbone,
        prompts={"input_ids": io["prompt_ids"], "attention_mask": io["attention_mask"]},
        greedy={1.0: io["greedy.tokens"][:, :count]},
        logits4={1.0: io["greedy.logits4"][None, ..., : backbone.codebook_size]},
        forced=io["forced.tokens"][:, :count],
        forced_logits=io["forced.logits"][None, :, :count, : backbone.codebook_size],
        generate=generate,
    )


def emu3_5(**options: Any) -> Case:
    """No checkpoint is stored: random weights, references from the library's plain forward of whole sequences."""
    config = transformers.Qwen3Config(
        vocab_size=72,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(5)
    plain = transformers.Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for weight in plain.parameters():
            if weight.ndim == 2:
                weight.normal_(std=1.5 / weight.shape[1] ** 0.5)
            else:
                weight.normal_(1.0, 0.2)
        plain.model.embed_tokens.weight.normal_()
    model = plain
    if options:
        model = transformers.Qwen3ForCausalLM._from_config(config, **options).eval()
        model.load_state_dict(plain.state_dict())
    names = {"bos": 1, "eol": 3, "boi": 6, "eoi": 7, "wrapper": 5, "first_code": 40}
    backbone = wrap(model, family="emu3.5", grid_size=(4, 4), token_ids=names)
    visual, layout = backbone.code_ids(), backbone.layout()
    prompts = {
        "input_ids": torch.tensor([[0, 0, 1, 20, 21, 6, 14, 5], [1, 22, 23, 24, 25, 6, 14, 5]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8]),
    }
    empty = torch.tensor([[1, 30, 6, 14, 5]])  # another template, then the same header
    negative = {"input_ids": empty.repeat(2, 1), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    forced = torch.randint(len(visual), (2, 16), generator=torch.Generator().manual_seed(6))
    stream = backbone.to_stream(forced)[:, : layout.run_length + 1]

    def logits_after(row: Tensor, codes: Tensor) -> Tensor:
        """[S, V] laws of all slots, by one plain forward without cache."""
        with torch.no_grad():
            return plain(torch.cat([row, codes])[None]).logits[0, len(row) - 1 : -1, visual]

    def both(i: int) -> Tensor:
        row = prompts["input_ids"][i][prompts["attention_mask"][i].bool()]
        return torch.stack([logits_after(row, stream[i]), logits_after(empty[0], stream[i])])

    free = layout.forced[: layout.run_length + 1] < 0
    forced_logits = torch.stack([both(i) for i in range(2)], dim=1)[:, :, free]

    def generate(inputs: dict[str, Tensor], scale: float) -> Tensor:
        length, batch = inputs["input_ids"].shape[1], len(inputs["input_ids"])

        def allowed(row: int, sequence: Tensor) -> list[int]:
            token = int(layout.forced[len(sequence) - length])
            return visual.tolist() if token < 0 else [token]

        sequences = plain.generate(
            **inputs,
            guidance_scale=scale,
            negative_prompt_ids=empty.repeat(batch, 1),
            prefix_allowed_tokens_fn=allowed,
            do_sample=False,
            max_new_tokens=layout.length,
        )
        return codes_of(backbone, sequences[:, length:])

    return Case(
        backbone=backbone,
        prompts=prompts,
        greedy={3.0: generate(prompts, 3.0)},
        logits4={},
        forced=forced,
        forced_logits=forced_logits,
        generate=generate,
        negative=negative,
    )


def codes_of(backbone: Any, tokens: Tensor) -> Tensor:
    """Codes of the free slots of a stream of token ids."""
    ids = backbone.code_ids()
    place = torch.full((int(max(ids.max(), tokens.max())) + 1,), -1)
    place[ids] = torch.arange(len(ids))
    return place[tokens[:, free_of(backbone)]]


def free_of(backbone: Any) -> Tensor:
    return backbone.layout().forced < 0


def pair(io: dict[str, Tensor], prefix: str, suffix: str) -> Tensor:
    return torch.stack([io[f"{prefix}.{branch}_{suffix}"] for branch in ("cond", "uncond")])


BUILDERS: dict[str, Callable[..., Case]] = {
    "janus": janus,
    "emu3": emu3,
    "chameleon": partial(chameleon, "fixed"),
    "lumina": partial(chameleon, "grid"),
    "glm_image": glm_image,
    "emu3_5": emu3_5,
}


@cache
def case(name: str) -> Case:
    return BUILDERS[name]()
