"""Every layer of every family is called in a decode, and its weights are read nowhere else.

Whatever others put around the call of a layer (LoRA, layerwise casting, offloading, quantisation) then takes effect.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import vargen
from vargen.backbones.layers.code_table import CodeTable
from vargen.backbones.layers.transformer import RMSNorm
from vargen.backbones.llamagen.any_order import AnyOrderTransformer
from vargen.backbones.llamagen.masked import MaskedTransformer
from vargen.draft_models.eagle import EagleDrafter

LEAVES = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd, nn.LayerNorm, nn.GroupNorm, RMSNorm, CodeTable)
LABELS, WORDS = torch.tensor([1, 2]), torch.tensor([[1, 0, 2], [3, 1, 0]])
CAPTIONS = torch.randn(2, 3, 6), torch.ones(2, 3, dtype=torch.bool)
BODY = {"dim": 32, "num_layers": 2, "num_heads": 2, "grid_size": (4, 4), "codebook_size": 32, "num_classes": 10}
IN_WORDS = {"condition_type": "attributes", "num_condition_tokens": 3, "num_attributes": 5}
IN_CAPTIONS = {"condition_type": "caption", "num_condition_tokens": 3, "caption_dim": 6}
CLIP = {**BODY, "dim": 24, "grid_size": (3, 2, 4), "block": (1, 1, 4), "max_positions": None}
HEAD = {"head_depth": 1, "head_width": 16, "num_sampling_steps": "3"}
PIXELS = {"grid_size": (2, 2), "latent_channels": 4, **HEAD}
MAR = {**PIXELS, "encoder_dim": 16, "encoder_depth": 1, "encoder_num_heads": 2, "num_classes": 10}
MAR |= {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, "buffer_size": 4}
SCALES = {"dim": 16, "num_layers": 2, "num_heads": 2, "num_classes": 10, "scales": [1, 2], "codebook_size": 32}
CONV = {"base_channels": 8, "channel_multipliers": [1, 2], "num_res_blocks": 1, "norm_num_groups": 4}
MULTI = {**CONV, "codebook_size": 32, "codebook_dim": 8, "scales": [1, 2, 3, 4]}
FRAMES = {"base_channels": 8, "channel_multipliers": [1, 2], "temporal_downsample": [True], "num_res_blocks": 1}
FRAMES |= {"num_mid_blocks": 1, "levels": [4, 4], "norm_num_groups": 4}


class Counted(nn.Module):
    """A layer behind a counter; what it holds can be called, its weights cannot be read."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.calls = layer, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.layer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in ("layer", "calls") or name.startswith("_"):
            return super().__getattr__(name)
        found = getattr(self.layer, name)
        return (
            torch.full_like(found, math.nan) if isinstance(found, torch.Tensor) else found
        )  # size and dtype, no numbers


def count_leaves(module: nn.Module, prefix: str = "") -> dict[str, Counted]:
    """Put a counter around every leaf."""
    counters = {}
    for name, child in list(module.named_children()):
        place = f"{prefix}{name}"
        if isinstance(child, LEAVES):
            counters[place] = Counted(child)
            module._modules[name] = counters[place]
        else:
            counters |= count_leaves(child, f"{place}.")
    return counters


@dataclass(frozen=True)
class Family:
    """A model in miniature and a decode. No family has a leaf that only training calls."""

    build: Callable[[], nn.Module]
    run: Callable[[Any], Any]


def drawn(sampler: str, condition: Any, **settings: Any) -> Callable[[Any], Any]:
    def run(model: Any, **given: Any) -> Any:
        out = getattr(vargen, sampler)(**settings).sample(model, condition, seeds=[1, 2], **given)
        return out.codes if out.codes is not None else out.latents

    return run


def made(kind: Any, *configs: dict[str, Any], **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        wanted: dict[str, Any] = {}
        for part in (*configs, config):
            wanted |= part
        model = (getattr(vargen, kind) if isinstance(kind, str) else kind)(**wanted)
        for weight in model.parameters():  # nothing switched off by its initialisation
            nn.init.normal_(weight, std=0.3)
        return model.eval()

    return build


def there_and_back(images: torch.Tensor) -> Callable[[Any], Any]:
    return lambda tokenizer: tokenizer.decode(tokenizer.encode(images).codes)


@cache
def target() -> nn.Module:
    return made("LlamaGenTransformer", BODY)()


def drafted(model: Any) -> Any:
    backbone = target()
    sampler = vargen.SpeculativeSampler(guidance_scale=1.5)
    return sampler.sample(backbone, LABELS, seeds=[1, 2], drafter=model).codes


def scales(condition: Any) -> Callable[[Any], Any]:
    tokenizer = made("MultiScaleVQTokenizer", MULTI, scales=[1, 2])()
    run = drawn("NextScaleSampler", condition, guidance_scale=1.5)
    return lambda model: torch.cat(run(model, tokenizer=tokenizer), dim=1)


def first_scales(model: Any) -> Any:
    session, _ = model.open(model.prepare(CAPTIONS, guidance_scale=2.0))
    return model.step(session, torch.ones(2, 4, 3, dtype=torch.float32)).logits


def own_scales(model: Any) -> Any:
    features, mask = CAPTIONS
    given = features, features[:, 0], mask
    session, _ = model.open(model.prepare(given, guidance_scale=2.0, negative=given))
    return model.step(session, torch.ones(2, 4, 8, dtype=torch.float32)).logits


SWITTI = {"dim": 16, "num_layers": 2, "num_heads": 2, "codebook_size": 32, "codebook_dim": 8, "scales": [1, 2, 3]}
SWITTI |= {"text_dim": 6, "pooled_dim": 6, "ffn_dim": 24}
INFINITY = {
    "dim": 16,
    "num_layers": 3,
    "num_heads": 2,
    "num_bits": 3,
    "scales": [1, 2, 3],
    "max_scales": 4,
    "ffn_dim": 24,
}
INFINITY |= {"text_dim": 6, "text_length": 6, "text_pool_heads": 2}
NEXT = drawn("NextTokenSampler", LABELS, guidance_scale=1.5)
GROUPS = drawn("ParallelGroupSampler", LABELS, guidance_scale=1.5)
ORDERS = drawn("ParallelGroupSampler", LABELS, guidance_scale=1.5, num_steps=6)
NEAR = drawn("NeighboringSampler", LABELS, guidance_scale=1.5)
BLOCKS = drawn("NextBlockSampler", LABELS, guidance_scale=1.5)
SHARED = {"code_rank": 4}
PIECE = torch.zeros(2, 3, 8, 8)
CASES: dict[str, Family] = {
    "llamagen": Family(made("LlamaGenTransformer", BODY), NEXT),
    "llamagen-captions": Family(made("LlamaGenTransformer", BODY, IN_CAPTIONS), drawn("NextTokenSampler", CAPTIONS)),
    "llamagen-words": Family(made("LlamaGenTransformer", BODY, IN_WORDS), drawn("NextTokenSampler", WORDS)),
    "any-order": Family(made(AnyOrderTransformer, BODY), ORDERS),
    "masked": Family(made(MaskedTransformer, BODY), drawn("MaskedSampler", LABELS, guidance_scale=1.5)),
    "par": Family(made("PARTransformer", BODY, group_size=4), GROUPS),
    "nar": Family(made("NARTransformer", BODY), NEAR),
    "nar-shared": Family(made("NARTransformer", BODY, SHARED), NEAR),
    "nar-video": Family(made("NARTransformer", BODY, grid_size=(2, 2, 2)), NEAR),
    "nbp": Family(made("NBPTransformer", CLIP, condition_type="class"), BLOCKS),
    "nbp-text": Family(
        made(
            "NBPTransformer",
            CLIP,
            condition_type="text",
            num_condition_tokens=3,
            text_vocabulary=9,
            restrict_head=True,
        ),
        drawn("NextBlockSampler", WORDS, guidance_scale=1.5),
    ),
    "nbp-shared": Family(
        made("NBPTransformer", CLIP, SHARED, IN_WORDS, rope=True), drawn("NextBlockSampler", WORDS, guidance_scale=1.5)
    ),
    "var": Family(made("VARTransformer", SCALES, codebook_dim=8), scales(LABELS)),
    "var-shared-norms": Family(made("VARTransformer", SCALES, codebook_dim=8, shared_aln=True), scales(LABELS)),
    "var-words": Family(made("VARTransformer", SCALES, IN_WORDS, codebook_dim=8, codebook_head=True), scales(WORDS)),
    "infinity": Family(made("InfinityTransformer", INFINITY), first_scales),
    "switti": Family(made("SwittiTransformer", SWITTI), own_scales),
    "mar": Family(
        made("MARTransformer", MAR), drawn("ContinuousMaskedSampler", LABELS, num_steps=2, guidance_scale=2.0)
    ),
    "mar-words": Family(made("MARTransformer", MAR, IN_WORDS), drawn("ContinuousMaskedSampler", WORDS, num_steps=2)),
    "mar-causal": Family(
        made("CausalMARTransformer", PIXELS, dim=16, num_layers=1, num_heads=2, num_classes=10),
        drawn("ContinuousSpeculativeSampler", LABELS, num_draft_tokens=0),
    ),
    "xar": Family(
        made(
            "XARTransformer",
            dim=16,
            encoder_depth=1,
            decoder_depth=1,
            num_heads=2,
            num_classes=10,
            latent_channels=4,
            cells=(2, 2),
        ),
        drawn("NextCellSampler", LABELS, num_steps=2, guidance_scale=2.0),
    ),
    "eagle": Family(
        made(
            EagleDrafter, dim=32, num_heads=2, ffn_dim=16, codebook_size=32, grid_size=(4, 4), num_condition_tokens=1
        ),
        drafted,
    ),
    "vq": Family(made("VQTokenizer", CONV, codebook_size=32, z_channels=8), there_and_back(PIECE)),
    "vq-patches": Family(
        made("VQTokenizer", CONV, codebook_size=32, codebook_dim=12, l2_norm=False, encoder_type="patch"),
        there_and_back(PIECE),
    ),
    "multiscale": Family(made("MultiScaleVQTokenizer", MULTI), there_and_back(PIECE)),
    "multiscale-one-phi": Family(made("MultiScaleVQTokenizer", MULTI, num_phi=1), there_and_back(PIECE)),
    "multiscale-own-phi": Family(made("MultiScaleVQTokenizer", MULTI, num_phi=0), there_and_back(PIECE)),
    "bits": Family(made("MultiScaleBSQTokenizer", CONV, codebook_dim=4, scales=[1, 2, 4]), there_and_back(PIECE)),
    "frames": Family(made("VideoFSQTokenizer", FRAMES), there_and_back(torch.zeros(1, 3, 5, 8, 8))),
    "frames-flat": Family(
        made("VideoFSQTokenizer", FRAMES, factorized=True, refine_channels=4),
        there_and_back(torch.zeros(1, 3, 5, 8, 8)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_leaf_is_called_in_a_decode(name: str) -> None:
    family = CASES[name]
    model = family.build()
    with torch.no_grad():
        expected = family.run(model)
        counters = count_leaves(model)
        assert torch.equal(family.run(model), expected)
    assert counters
    assert [place for place, counter in counters.items() if not counter.calls] == []


def test_a_leaf_that_is_read_past_its_forward_is_seen() -> None:
    """The test above can fail: a weight that is read has no numbers, and a leaf that is not called is listed."""
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    counters = count_leaves(layers)
    layers[0](torch.zeros(1, 2))
    assert [counter.calls for counter in counters.values()] == [1, 0]
    assert bool(nn.functional.linear(torch.zeros(1, 2), layers[1].weight).isnan().all())


class LowRank(nn.Module):
    """An adapter as peft's: the layer it stands around, and a low-rank update beside it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.down, self.up = nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("layer", ["mat_qkv", "head"])
def test_habit_adapters_change_the_codes_of_next_scale_models(layer: str) -> None:
    family = CASES["var-words"]
    model = family.build()
    before = family.run(model)
    owners = [module for module in model.modules() if isinstance(getattr(module, layer, None), nn.Linear)]
    for owner in owners:
        setattr(owner, layer, LowRank(getattr(owner, layer)))
    assert owners
    assert not torch.equal(family.run(model), before)
