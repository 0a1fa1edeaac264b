"""Training of NAR's transformer on the codes of a frozen tokenizer (arXiv:2503.10696, section 3.3).

The loss is the cross-entropy of the averaged guesses. Training can start from a LlamaGen model of the same width: its
blocks know the positions and the parts already, what changes is who sees whom.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vargen.backbones.llamagen.model import LlamaGenTransformer
from vargen.backbones.nar.model import NARTransformer
from vargen.training.sources import RECIPE_FILE, component_folder, start_from_weights, stored_recipe
from vargen.training.tasks.base import model_from
from vargen.training.tasks.llamagen import LlamaGenOptions, LlamaGenTask
from vargen.validation.reading import local_path, read_json

if TYPE_CHECKING:
    from vargen.samplers.base import Sampler


@dataclass(frozen=True, kw_only=True)
class NAROptions(LlamaGenOptions):
    """The tokenizer, the model to start from, and how the sample grids are drawn."""

    start: str = ""  # folder or name of a LlamaGen model, or of a NAR model of the same shape; empty = random weights
    blocks: tuple[int, ...] = ()  # its blocks that become ours, one a layer; empty = the first ones


class NARTask(LlamaGenTask):
    """Train a ``NARTransformer`` on conditions and codes."""

    Options = NAROptions

    def build(self, initialize: bool) -> NARTransformer:  # type: ignore[override]
        """Make the transformer for the tokenizer's codebook and the data set's conditions."""
        model: NARTransformer = model_from(NARTransformer, self.model_settings(), **self.fixed())
        if initialize and self.options.start and _is_nar(self.options.start):
            start_from_weights(model, self.options.start, "backbone")
        elif initialize and self.options.start:
            source = LlamaGenTransformer.from_pretrained(component_folder(self.options.start, "backbone"))
            codes = torch.cat([self.test_batch(start, 64)["codes"] for start in range(0, 256, 64)])
            start_from(model, source, tuple(self.options.blocks), codes)
        return model

    def sampler(self) -> Sampler:
        """What draws the sample grids."""
        from vargen.samplers.schedule.neighboring import NeighboringSampler

        return NeighboringSampler(guidance_scale=self.options.guidance_scale)


def _is_nar(source: str) -> bool:
    folder = local_path(source)
    if (folder / RECIPE_FILE).is_file():
        return stored_recipe(folder).task == "nar"
    config = read_json(component_folder(source, "backbone") / "config.json")
    return config.get("_class_name") == "NARTransformer"


@torch.no_grad()
def start_from(model: NARTransformer, source: LlamaGenTransformer, blocks: tuple[int, ...], codes: Tensor) -> None:
    """Copy what a LlamaGen model knows into a NAR model of the same width and heads.

    The blocks above the first head copy the last block with their output switched off, so that all heads start equal.
    Feed-forwards narrower than the source's keep its strongest channels; a narrow code table keeps the directions in
    which the tables of the source differ most over ``codes``.

    Args:
        model: changed in place.
        source: of the same width, heads and condition.
        blocks: which of its blocks become ours below the first head; empty = the first ones.
        codes: int64 of any shape, to know how often each code occurs.

    Raises:
        ValueError: other width, number of heads or number of blocks.
    """
    depth, given = model.config.num_layers, source.config
    blocks = blocks or tuple(range(depth))
    if (given.dim, given.num_heads) != (model.config.dim, model.config.num_heads):
        raise ValueError(
            f"start must be a model of width {model.config.dim} with {model.config.num_heads} heads, "
            f"got {given.dim} with {given.num_heads}"
        )
    if len(blocks) != depth or max(blocks) >= len(source.layers):
        raise ValueError(f"blocks must name {depth} blocks of 0..{len(source.layers) - 1}, got {list(blocks)}")
    extra = len(model.layers) - depth
    for i, j in enumerate((*blocks, *[blocks[-1]] * extra)):
        _copy_block(model.layers[i], source.layers[j])  # type: ignore[arg-type]
        if i >= depth:
            for name in ("attention.wo", "feed_forward.w2"):
                nn.init.zeros_(model.layers[i].get_submodule(name).weight)  # type: ignore[arg-type]
    model.cls_embedding.load_state_dict(source.cls_embedding.state_dict())
    for norm, _ in model.heads:
        getattr(model, norm).load_state_dict(source.norm.state_dict())
    _copy_tables(model, source, codes)


def _copy_block(block: nn.Module, source: nn.Module) -> None:
    state = source.state_dict()
    width = block.get_submodule("feed_forward.w1").weight.shape[0]  # type: ignore[union-attr,index]
    names = {name: f"feed_forward.{name}.weight" for name in ("w1", "w2", "w3")}
    w1, w2, w3 = (state[names[name]] for name in ("w1", "w2", "w3"))
    strongest = (w1.norm(dim=1) * w3.norm(dim=1) * w2.norm(dim=0)).topk(width).indices.sort().values
    state |= {names["w1"]: w1[strongest], names["w3"]: w3[strongest], names["w2"]: w2[:, strongest]}
    block.load_state_dict(state)


def _copy_tables(model: NARTransformer, source: LlamaGenTransformer, codes: Tensor) -> None:
    tables = [source.tok_embeddings.weight, source.output.weight]
    rank = model.config.code_rank
    if rank is None:
        model.tok_embeddings.weight.copy_(tables[0])
        for _, output in model.heads:
            getattr(model, output).weight.copy_(tables[1])
        return
    scales = [table.square().mean().sqrt().clamp(min=1e-12) for table in tables]  # an untrained head is zero
    both = torch.cat([table / scale for table, scale in zip(tables, scales, strict=True)], dim=1)  # V 2D
    often = torch.bincount(codes.flatten(), minlength=len(both)).to(both.dtype) + 1.0
    directions = torch.linalg.svd(both * often.sqrt()[:, None], full_matrices=False).Vh[:rank]  # r 2D
    model.tok_embeddings.weight.copy_(both @ directions.T)
    inward, outward = directions.chunk(2, dim=1)  # r D each
    model.tok_embeddings.projection.weight.copy_(inward.T * scales[0])  # type: ignore[union-attr,operator]
    for _, output in model.heads:
        getattr(model, output).weight.copy_(outward * scales[1])
