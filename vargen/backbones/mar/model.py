"""MAR: masked autoregression over continuous tokens (Li et al., 2024, arXiv:2406.11838).

A bidirectional encoder reads the tokens that are known, a decoder writes a state z for every position, and the diffusion
head turns z into a distribution. Parameter names are those of the official checkpoints; attribute conditions are an
addition of this library.

Letters: B images, G guidance branches (conditional first), R = G * B rows, N tokens, D numbers of a token, M buffer
positions, E width of the encoder, Z width of the decoder.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vargen.backbones.decoding.continuous import ContinuousBackbone
from vargen.backbones.decoding.window import PreparedCondition
from vargen.backbones.layers.cache.kv_cache import attention
from vargen.backbones.layers.conditions import AttributeEmbedding, LabelTable, drop_condition
from vargen.backbones.layers.diffusion_head import DiffusionHead
from vargen.backbones.mar.layers import ViTBlock, draw_mask_ratio
from vargen.backbones.mar.sizes import infer_mar_config, mar_size_config, read_averaged
from vargen.backbones.settings.continuous import MAR
from vargen.checkpoints.reader import load_family
from vargen.features import Feature
from vargen.hooks import compute_dtype, runs_as_forward
from vargen.validation.checks import checked
from vargen.validation.folders import Stored


class MARTransformer(ContinuousBackbone, Stored, ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Encoder over known tokens, decoder over all positions, diffusion head.

    Args:
        grid_size: (height, width) in tokens.
        latent_channels: C of the autoencoder.
        patch_size: p; a token is p x p latents, D = C p p.
        encoder_dim: E.
        encoder_depth: blocks.
        encoder_num_heads: heads.
        decoder_dim: Z.
        decoder_depth: blocks.
        decoder_num_heads: heads.
        mlp_ratio: hidden width of the feed-forwards in units of their width.
        condition_type: ``"class"`` (published: M copies of the class vector) or ``"attributes"`` (one buffer position each).
        num_classes: labels without the null label ("class").
        num_condition_tokens: number of slots, which is then M ("attributes").
        num_attributes: attribute ids, 0 = unspecified included ("attributes").
        buffer_size: M ("class").
        head_depth: blocks of the head.
        head_width: width of the head.
        num_sampling_steps: steps of a chain, see ``spaced_timesteps``.
        last_timestep: training step at which chains start; None = the last one.
        prediction_type: ``"epsilon"`` (published) or ``"v_prediction"``, see ``DiffusionHead``.
        diffusion_batch_mul: times drawn a token in training.
        mask_ratio_min: least share of tokens masked in training.
        mask_ratio_std: spread of that share below 1. Decoding along a cosine meets every share alike, so that small grids
            want that share spread evenly: least share near 0, spread near 1.
        input_noise: spread of the noise added to the tokens read in training, so that the model forgives its own errors.
        dropout: behind projections, in training.
        class_dropout_prob: probability of training a sample without its condition.
    """

    config_name = "config.json"
    features = frozenset({Feature.CONTINUOUS, Feature.MASKED_CONTINUOUS})
    _supports_gradient_checkpointing = True
    _no_split_modules = ("ViTBlock",)
    gradient_checkpointing = False

    @checked(MAR)
    @register_to_config
    def __init__(
        self,
        grid_size: tuple[int, int] = (16, 16),
        latent_channels: int = 16,
        patch_size: int = 1,
        encoder_dim: int = 768,
        encoder_depth: int = 12,
        encoder_num_heads: int = 12,
        decoder_dim: int = 768,
        decoder_depth: int = 12,
        decoder_num_heads: int = 12,
        mlp_ratio: float = 4.0,
        condition_type: Literal["class", "attributes"] = "class",
        num_classes: int = 1000,
        num_condition_tokens: int = 0,
        num_attributes: int = 0,
        buffer_size: int = 64,
        head_depth: int = 6,
        head_width: int = 1024,
        num_sampling_steps: str = "100",
        last_timestep: int | None = None,
        prediction_type: str = "epsilon",
        diffusion_batch_mul: int = 4,
        mask_ratio_min: float = 0.7,
        mask_ratio_std: float = 0.25,
        input_noise: float = 0.0,
        dropout: float = 0.1,
        class_dropout_prob: float = 0.1,
    ) -> None:
        super().__init__()
        self.grid_size = grid_size
        token_dim = latent_channels * patch_size**2
        length = self.grid_size[0] * self.grid_size[1]
        if condition_type == "class":
            self.class_emb = LabelTable(num_classes, encoder_dim)
            self.fake_latent = nn.Parameter(torch.empty(1, encoder_dim))
        else:
            self.attribute_emb = AttributeEmbedding(num_attributes, num_condition_tokens, encoder_dim)
            buffer_size = num_condition_tokens
        self.buffer_size = buffer_size
        self.z_proj, self.z_proj_ln = nn.Linear(token_dim, encoder_dim), nn.LayerNorm(encoder_dim, eps=1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, buffer_size + length, encoder_dim))
        self.encoder_blocks = nn.ModuleList(
            ViTBlock(encoder_dim, encoder_num_heads, mlp_ratio, dropout) for _ in range(encoder_depth)
        )
        self.encoder_norm = nn.LayerNorm(encoder_dim, eps=1e-6)
        self.decoder_embed = nn.Linear(encoder_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, buffer_size + length, decoder_dim))
        self.decoder_blocks = nn.ModuleList(
            ViTBlock(decoder_dim, decoder_num_heads, mlp_ratio, dropout) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.empty(1, length, decoder_dim))
        self.initialize_weights()
        self.diffloss = DiffusionHead(
            token_dim, decoder_dim, head_depth, head_width, num_sampling_steps, last_timestep, prediction_type
        )

    def initialize_weights(self) -> None:
        """Xavier for the transformers, N(0, 0.02) for tables, as in the official training; the head has its own."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for table in self.parameters(recurse=False):
            nn.init.normal_(table, std=0.02)

    @classmethod
    def from_size(cls, size: str, **config: Any) -> MARTransformer:
        """Build a published size with random weights: "base", "large" or "huge"."""
        return cls(**{**mar_size_config(size), **config})

    @classmethod
    def from_original(cls, checkpoint: Any, **config: Any) -> MARTransformer:
        """Load an official checkpoint strictly.

        Args:
            checkpoint: path or state dict; of a training file the averaged weights (``model_ema``) are taken.
            config: heads where the width is not a published one, ``patch_size`` unless 1, ``num_sampling_steps``; anything
                else overrides what the shapes tell.
        """
        return load_family(cls, checkpoint, config, infer_mar_config, family="mar", read=read_averaged)

    @property
    def condition_embedding(self) -> LabelTable | AttributeEmbedding:
        """The table of the condition."""
        return self.class_emb if self.config.condition_type == "class" else self.attribute_emb

    def forward(
        self,
        tokens: Tensor,
        condition: Any,
        mask: Tensor,
        *,
        drop: Tensor | None = None,
        generator: torch.Generator | None = None,
        num_masked: int | None = None,
    ) -> Tensor:
        """States of all positions given the tokens that are not masked.

        In training mode conditions are dropped: with ``drop`` as given, else drawn from ``generator`` (or the global one).

        Args:
            tokens: [B, N, D]; what stands at masked positions is never read.
            condition: class ids [B] (``num_classes`` = none) or attribute ids [B, M].
            mask: [B, N], true or 1 where masked.
            drop: [B] bool, True = train without condition.
            generator: for the drop decisions and the noise on the input.
            num_masked: the number of masked positions of every image, where it is known: the encoder then reads the others
                alone without looking at the mask, which would stop a GPU and break a compiled graph.

        Returns:
            z [B, N, Z].
        """
        embedding = self.condition_embedding
        checked = embedding.check(condition, values=False)
        checked = drop_condition(embedding, checked, self.config, drop, generator, training=self.training)
        if self.training and self.config.input_noise > 0:
            where = tokens.device if generator is None else generator.device
            noise = torch.randn(tokens.shape, generator=generator, device=where).to(tokens)
            tokens = tokens + self.config.input_noise * noise
        return self._states(tokens, self._buffer(checked), mask.bool(), num_masked)

    def loss(self, tokens: Tensor, condition: Any, *, generator: torch.Generator | None = None) -> Tensor:
        """The training loss of a batch: one share of masked tokens for all, an order for each image.

        Args:
            tokens: [B, N, D] clean tokens.
            condition: as in ``forward``.
            generator: for masks, drops, times and noise; on the device of the tokens.
        """
        config = self.config
        ratio = draw_mask_ratio(
            config.mask_ratio_min, config.mask_ratio_std, generator if _on_host(generator) else None
        )
        count = max(1, math.ceil(self.num_codes * ratio))
        order = torch.rand(tokens.shape[:2], generator=generator, device=tokens.device).argsort(dim=1)
        mask = order < count
        z = self(tokens, condition, mask, generator=generator, num_masked=count)
        repeats = config.diffusion_batch_mul
        return self.diffloss.loss(
            tokens.flatten(0, 1), z.flatten(0, 1), mask.flatten(), repeats=repeats, generator=generator
        )

    @runs_as_forward
    @torch.no_grad()
    def prepare(self, condition: Any, *, guidance_scale: float | Tensor = 1.0) -> PreparedCondition:
        """Check and embed a batch of conditions; two branches iff ``guidance_scale`` is not 1."""
        embedding = self.condition_embedding
        parts = [embedding.check(condition)]
        if bool((torch.as_tensor(guidance_scale) != 1).any()):
            parts.append(embedding.null(parts[0]))
        return PreparedCondition(torch.cat([self._buffer(part) for part in parts]), None, len(parts[0]), len(parts))

    @runs_as_forward
    @torch.no_grad()
    def predict(self, condition: PreparedCondition, tokens: Tensor, mask: Tensor) -> Tensor:
        """States of all positions for decoding.

        Args:
            condition: from ``prepare``.
            tokens: [B, N, D], the same for every branch.
            mask: [B, N] bool, True = not known; images may know different numbers of tokens.

        Returns:
            z [G, B, N, Z].
        """
        if self.training:
            raise ValueError("the model is in training mode and its dropout would disturb decoding; call model.eval()")
        branches = condition.branches
        z = self._states(tokens.repeat(branches, 1, 1), condition.embeddings, mask.bool().repeat(branches, 1))
        return z.unflatten(0, (branches, -1))

    def _buffer(self, checked: Tensor) -> Tensor:
        """Condition ids to the M vectors in front of the tokens: ``[R, M, E]``."""
        if self.config.condition_type == "attributes":
            return self.attribute_emb(checked)
        last = self.config.num_classes - 1  # the null label, behind it, is no row of the table
        rows = torch.where((checked > last)[:, None], self.fake_latent, self.class_emb(checked.clamp(max=last)))
        return rows[:, None].expand(-1, self.buffer_size, -1)

    def _states(self, tokens: Tensor, buffer: Tensor, mask: Tensor, num_masked: int | None = None) -> Tensor:
        """z ``[R, N, Z]``."""
        h, seen, index = self._encode(tokens, buffer, mask, num_masked)
        h = self.decoder_embed(h)
        x = self.mask_token.expand(len(h), self.buffer_size + self.num_codes, -1)
        if index is None:
            x = torch.where(seen[..., None], h, x)
        else:
            x = x.to(h.dtype).scatter(1, index[..., None].expand_as(h), h)
        x = self._run(self.decoder_blocks, x + self.decoder_pos_embed_learned, None)
        return self.decoder_norm(x)[:, self.buffer_size :] + self.diffusion_pos_embed_learned

    def _encode(
        self, tokens: Tensor, buffer: Tensor, mask: Tensor, num_masked: int | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Encoded buffer and known tokens, ``[R, M + N]`` which positions these are, and their places ``[R, w]``.

        Where images know different numbers of tokens, or a graph is traced that cannot depend on it, nothing is gathered:
        unknown ones stay, and nobody looks at them.
        """
        x = torch.cat([buffer, self.z_proj(tokens.to(compute_dtype(self.z_proj)))], dim=1)
        x = self.z_proj_ln(x + self.encoder_pos_embed_learned)
        seen = torch.cat([mask.new_ones(len(mask), self.buffer_size), ~mask], dim=1)
        num_seen = _common_count(seen) if num_masked is None else seen.shape[1] - num_masked
        if num_seen is None:
            x = self._run(self.encoder_blocks, x, seen[:, None, None])
            return self.encoder_norm(x), seen, None
        index = seen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :num_seen]  # in their order
        x = self._run(self.encoder_blocks, x.gather(1, index[..., None].expand(-1, -1, x.shape[-1])), None)
        return self.encoder_norm(x), seen, index

    def _run(self, blocks: nn.ModuleList, x: Tensor, mask: Tensor | None) -> Tensor:
        attend = partial(attention, mask=mask)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in blocks:
            x = checkpoint(block, x, None, attend, use_reentrant=False) if recompute else block(x, None, attend)
        return x


def _common_count(seen: Tensor) -> int | None:
    """How many positions of ``[R, L]`` each row sees; None where rows differ, or where a traced graph must not ask."""
    if torch.compiler.is_compiling():
        return None
    low, high = (int(count) for count in seen.sum(1).aminmax())
    return low if low == high else None


def _on_host(generator: torch.Generator | None) -> bool:
    return generator is not None and generator.device.type == "cpu"
