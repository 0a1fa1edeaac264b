"""xAR: autoregression over cells of an image, each drawn by a flow (Ren et al., 2025, arXiv:2502.20388), the cell variant.

Encoder and decoder are one block-causal stack: a token sees its own cell and the cells before it. Every cell has a time of its
own, 0 clean, 1 noise; in training the context is noisy too. Parameter names are those of the official checkpoints.

Letters: B images, G guidance branches, R = G * B rows, K cells, M tokens of a cell, C latent channels, E width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vargen.backbones.layers.cache.kv_cache import Attend, KVCache, attention
from vargen.backbones.layers.conditions import LabelEmbedding
from vargen.backbones.layers.diffusion_head import TimeEmbedding
from vargen.backbones.layers.rope import grid_table, spread
from vargen.backbones.layers.tables import DeviceTables
from vargen.backbones.layers.transformer import RMSNorm
from vargen.backbones.settings.continuous import XAR
from vargen.backbones.xar.layers import XARBlock
from vargen.backbones.xar.sizes import RECOMPUTED, infer_xar_config, xar_size_config
from vargen.checkpoints.reader import load_family
from vargen.features import Feature
from vargen.hooks import HookedModel, compute_dtype, runs_as_forward
from vargen.validation.checks import checked
from vargen.validation.folders import Stored


class XARSession:
    """The state of one decode: the cache and the labels of its rows."""

    def __init__(self, cache: KVCache, labels: Tensor, branches: int) -> None:
        self.cache, self.labels, self.branches, self.batch = cache, labels, branches, len(labels) // branches


class XARTransformer(HookedModel, Stored, ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Block-causal flow transformer over cells.

    Args:
        grid_size: (height, width) in latents.
        cells: (rows, columns) of cells; every cell is drawn whole.
        latent_channels: C.
        dim: E.
        encoder_depth: blocks of the first half.
        decoder_depth: blocks of the second half.
        num_heads: heads.
        mlp_ratio: hidden width of the feed-forward in units of 2/3 E.
        num_classes: labels without the null label.
        class_dropout_prob: probability of training a sample without its label.
    """

    config_name = "config.json"
    features = frozenset({Feature.CONTINUOUS, Feature.CELLS})

    @checked(XAR)
    @register_to_config
    def __init__(
        self,
        grid_size: tuple[int, int] = (16, 16),
        cells: tuple[int, int] = (2, 2),
        latent_channels: int = 16,
        dim: int = 768,
        encoder_depth: int = 8,
        decoder_depth: int = 8,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
    ) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.cell_size = (grid_size[0] // cells[0], grid_size[1] // cells[1])
        length = grid_size[0] * grid_size[1]
        self.z_proj, self.z_proj_ln = nn.Linear(latent_channels, dim), RMSNorm(dim, 1e-6)
        self.class_emb, self.time_embed = LabelEmbedding(num_classes, dim), TimeEmbedding(dim)
        self.encoder_pos_embed_learned = nn.Parameter(torch.randn(1, length, dim) * 0.02)
        self.decoder_pos_embed_learned = nn.Parameter(torch.randn(1, length, dim) * 0.02)
        self.encoder_blocks = nn.ModuleList(XARBlock(dim, num_heads, mlp_ratio) for _ in range(encoder_depth))
        self.decoder_blocks = nn.ModuleList(XARBlock(dim, num_heads, mlp_ratio) for _ in range(decoder_depth))
        self.encoder_norm, self.decoder_norm = RMSNorm(dim, 1e-6), RMSNorm(dim, 1e-6)
        self.decoder_embed, self.pred = nn.Linear(dim, dim), nn.Linear(dim, latent_channels)
        self._rope = DeviceTables()
        self._rope_table(torch.device("cpu"))

    @classmethod
    def from_size(cls, size: str, **config: Any) -> XARTransformer:
        """Build a published size with random weights: "B", "L" or "H"."""
        return cls(**{**xar_size_config(size), **config})

    @classmethod
    def from_original(cls, checkpoint: Any, **config: Any) -> XARTransformer:
        """Load an official checkpoint strictly; sizes are inferred, ``num_heads`` is needed for unpublished widths."""
        return load_family(cls, checkpoint, config, infer_xar_config, family="xar", ignore=RECOMPUTED)

    @property
    def num_cells(self) -> int:
        """Cells of an image, K."""
        return int(self.config.cells[0] * self.config.cells[1])

    @property
    def num_codes(self) -> int:
        """Tokens of an image, K M."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def token_dim(self) -> int:
        """Channels of a latent, C."""
        return int(self.config.latent_channels)

    def to_cells(self, latents: Tensor) -> Tensor:
        """Scaled latents ``[B, C, H, W]`` to ``[B, K, M, C]``, cells and their tokens row by row."""
        h, w = self.cell_size
        return rearrange(latents, "n c (a h) (b w) -> n (a b) (h w) c", h=h, w=w)

    def to_latents(self, tokens: Tensor) -> Tensor:
        """Tokens in cell order ``[B, K M, C]`` to scaled latents ``[B, C, H, W]``."""
        (a, b), (h, w) = self.config.cells, self.cell_size
        return rearrange(tokens, "n (a b h w) c -> n c (a h) (b w)", a=a, b=b, h=h, w=w)

    def forward(self, x: Tensor, t: Tensor, labels: Any, *, drop: Tensor | None = None) -> Tensor:
        """Velocities of all cells, every cell noisy at its own time.

        Args:
            x: [B, K, M, C] states, (1 - t) clean + t noise.
            t: [B, K] times in [0, 1].
            labels: [B] int64, ``num_classes`` = none.
            drop: [B] bool, True = train without label.

        Returns:
            [B, K, M, C], the guess of noise - clean.
        """
        checked = self.class_emb.check(labels, values=False)
        if drop is not None:
            checked = self.class_emb.drop(checked, drop)
        stamps = torch.arange(x.shape[1], device=x.device).repeat_interleave(x.shape[2])
        attend = partial(attention, mask=stamps <= stamps[:, None])
        depth = len(self.encoder_blocks) + len(self.decoder_blocks)
        return self._run(x, t, checked, 0, [attend] * depth)

    def loss(self, latents: Tensor, labels: Any, *, generator: torch.Generator | None = None) -> Tensor:
        """Noisy context learning: mean squared error of the velocity at independent logit-normal times of the cells."""
        clean = self.to_cells(latents)
        where = {"generator": generator, "device": clean.device}
        t = torch.randn(clean.shape[:2], **where).sigmoid()  # type: ignore[arg-type]
        noise = torch.randn(clean.shape, **where)  # type: ignore[arg-type]
        drop = torch.rand(len(clean), **where) < self.config.class_dropout_prob if self.training else None  # type: ignore[arg-type]
        x = torch.lerp(clean, noise, t[..., None, None])
        return F.mse_loss(self(x, t, labels, drop=drop), noise - clean)

    @runs_as_forward
    @torch.no_grad()
    def open(self, labels: Any, *, guidance_scale: float = 1.0) -> XARSession:
        """Check labels and make an empty session; two branches iff ``guidance_scale`` is not 1."""
        if self.training:
            raise ValueError("the model is in training mode; call model.eval()")
        parts = [self.class_emb.check(labels)]
        if guidance_scale != 1:
            parts.append(self.class_emb.null(parts[0]))
        rows = torch.cat(parts)
        depth = len(self.encoder_blocks) + len(self.decoder_blocks)
        return XARSession(KVCache(len(rows), self.num_codes, depth, device=rows.device), rows, len(parts))

    @runs_as_forward
    @torch.no_grad()
    def velocity(self, session: XARSession, cell: int, x: Tensor, t: float, clean: Tensor | None = None) -> Tensor:
        """Velocity of a cell.

        Args:
            session: from ``open``; the cells before are in its cache, but for ``clean``.
            cell: index of the cell.
            x: [B, M, C] state.
            t: its time.
            clean: [B, M, C] the finished cell before it, run along and cached; with the first call of a cell.

        Returns:
            [G, B, M, C].
        """
        first = cell if clean is None else cell - 1
        states = [x] if clean is None else [clean, x]
        times = torch.tensor([t] if clean is None else [0.0, t], device=x.device)
        stacked = torch.stack(states, dim=1).repeat(session.branches, 1, 1, 1).to(compute_dtype(self.z_proj))
        size = x.shape[1]
        stamps = torch.arange(first, cell + 1, device=x.device).repeat_interleave(size)
        plan = session.cache.plan_block(first * size, stamps)
        depth = len(self.encoder_blocks) + len(self.decoder_blocks)
        attends = [session.cache.layer(i, plan) for i in range(depth)]
        out = self._run(stacked, times.expand(len(stacked), -1), session.labels, first, attends)
        return out[:, -1].unflatten(0, (session.branches, -1))

    def _run(self, x: Tensor, t: Tensor, labels: Tensor, first: int, attends: Sequence[Attend]) -> Tensor:
        """States ``[R, k, M, C]`` of the cells from ``first`` on to velocities."""
        count, size = x.shape[1], x.shape[2]
        span = slice(first * size, (first + count) * size)
        condition = self.class_emb(labels)[:, None] + self.time_embed((1000 * t.float()).floor())  # R k E
        rope = self._rope_table(x.device)[span]
        h = self.z_proj_ln(self.z_proj(x.flatten(1, 2)) + self.encoder_pos_embed_learned[:, span])
        depth = len(self.encoder_blocks)
        for block, attend in zip(self.encoder_blocks, attends[:depth], strict=True):
            h = block(h, condition, rope, attend)
        h = self.decoder_embed(self.encoder_norm(h)) + self.decoder_pos_embed_learned[:, span]
        for block, attend in zip(self.decoder_blocks, attends[depth:], strict=True):
            h = block(h, condition, rope, attend)
        return cast(Tensor, self.pred(self.decoder_norm(h)).unflatten(1, (count, size)))

    def _rope_table(self, device: torch.device) -> Tensor:
        """[K M, 2, d] rotations in cell order, as ``rotate`` takes them."""
        return self._rope.get(device, self._rotations)[0]

    def _rotations(self) -> tuple[Tensor, ...]:
        table = grid_table(self.grid_size, self.config.dim // self.config.num_heads)
        order = torch.arange(len(table)).view(1, 1, *self.grid_size)
        return (spread(table[self.to_cells(order).flatten()]),)
