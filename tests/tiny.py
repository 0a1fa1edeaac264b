"""Tiny pipelines of real components: 8x8 pixels, 4x4 codes of 64, random weights."""

from __future__ import annotations

from typing import Any

import torch

from vargen.backbones.llamagen.model import LlamaGenTransformer
from vargen.backbones.var.model import VARTransformer
from vargen.conditioners.attributes import AttributeConditioner
from vargen.datasets.heroes.compose import HeroAtlas
from vargen.pipelines.image import ImagePipeline
from vargen.samplers.scale.next_scale import NextScaleSampler
from vargen.samplers.window.next_token import NextTokenSampler
from vargen.tokenizers.multiscale_vq.model import MultiScaleVQTokenizer
from vargen.tokenizers.vq.model import VQTokenizer

CODEBOOK_SIZE, GRID, NUM_CLASSES = 64, (4, 4), 10
SCALES = [1, 2, 4]


def tiny_tokenizer(codebook_size: int = CODEBOOK_SIZE) -> VQTokenizer:
    torch.manual_seed(0)
    tokenizer = VQTokenizer(
        base_channels=8,
        channel_multipliers=[1, 2],
        num_res_blocks=1,
        z_channels=8,
        codebook_size=codebook_size,
        codebook_dim=12,
        l2_norm=False,
        norm_num_groups=4,
        attention=False,
        encoder_type="patch",
    )
    torch.nn.init.uniform_(tokenizer.quantize.embedding.weight, -1, 1)
    return tokenizer.eval()


def tiny_backbone(**config: Any) -> LlamaGenTransformer:
    torch.manual_seed(1)
    defaults: dict[str, Any] = {
        "dim": 32,
        "num_layers": 2,
        "num_heads": 2,
        "grid_size": GRID,
        "num_classes": NUM_CLASSES,
        "condition_rope": "identity",
        "codebook_size": CODEBOOK_SIZE,
    }
    backbone = LlamaGenTransformer(**{**defaults, **config})
    torch.nn.init.normal_(backbone.output.weight, std=0.5)  # it starts at zero: every law would be flat
    return backbone.eval()


def tiny_pipeline(**components: Any) -> ImagePipeline:
    """A class-conditional pipeline without a progress bar."""
    defaults = {"tokenizer": tiny_tokenizer, "backbone": tiny_backbone, "sampler": NextTokenSampler}
    made = {name: components[name] if name in components else make() for name, make in defaults.items()}
    pipe = ImagePipeline(**{**components, **made})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_hero_pipeline() -> ImagePipeline:
    """A pipeline that reads prompts about heroes."""
    atlas = HeroAtlas.load()
    counts = {"num_attributes": atlas.num_attributes, "num_condition_tokens": len(atlas.slots)}
    backbone = tiny_backbone(condition_type="attributes", **counts)
    torch.nn.init.normal_(backbone.cls_embedding.embedding_table.weight)
    return tiny_pipeline(backbone=backbone, conditioner=AttributeConditioner("heroes"))


def tiny_scale_pipeline() -> ImagePipeline:
    """A next-scale pipeline: 1 + 4 + 16 codes."""
    shared: dict[str, Any] = {"codebook_size": CODEBOOK_SIZE, "codebook_dim": 12, "scales": SCALES}
    torch.manual_seed(3)
    tokenizer = MultiScaleVQTokenizer(
        base_channels=8, channel_multipliers=[1, 1], num_res_blocks=1, norm_num_groups=4, attention=False, **shared
    )
    torch.nn.init.normal_(tokenizer.quantize.embedding.weight, std=0.3)
    backbone = VARTransformer(dim=16, num_layers=2, num_heads=2, num_classes=NUM_CLASSES, **shared)
    for weight in backbone.parameters():  # nothing switched off by its initialisation
        torch.nn.init.normal_(weight, std=0.4)
    return tiny_pipeline(tokenizer=tokenizer.eval(), backbone=backbone.eval(), sampler=NextScaleSampler())
