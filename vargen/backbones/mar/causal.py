"""Causal autoregression over continuous tokens: the raster variant of MAR (arXiv:2406.11838, table 1) with a cache.

The paper compares with it and never released it. Blocks, rotary positions and the window session are LlamaGen's, so that one
forward verifies a window of drafts; only what goes in (tokens through a linear layer) and what comes out (a state z for the
diffusion head) differ.

Letters: B images, G guidance branches, N tokens, D numbers of a token, Z width, T condition positions, W window.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vargen.backbones.decoding.continuous import ContinuousBackbone
from vargen.backbones.decoding.window import WindowBackbone
from vargen.backbones.layers.conditions import AttributeEmbedding, ClassEmbedding
from vargen.backbones.layers.diffusion_head import DiffusionHead
from vargen.backbones.layers.rope import constant_rows, grid_table
from vargen.backbones.layers.tables import DeviceTables
from vargen.backbones.layers.transformer import RMSNorm, TransformerBlock, swiglu_dim
from vargen.backbones.settings.continuous import CAUSAL_MAR
from vargen.features import Feature
from vargen.hooks import compute_dtype, runs_as_forward
from vargen.protocols import StepOut
from vargen.validation.checks import checked
from vargen.validation.folders import Stored


class CausalMARTransformer(ContinuousBackbone, WindowBackbone, Stored, ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Causal transformer: condition, then tokens row by row; position i gives the state that token i is drawn from.

    Args:
        grid_size: (height, width) in tokens.
        latent_channels: C of the autoencoder.
        patch_size: p; a token is p x p latents, D = C p p.
        dim: Z.
        num_layers: blocks.
        num_heads: heads; Z / num_heads must be a multiple of 4 (two rotary axes).
        ffn_dim: hidden width of the feed-forward; None = two thirds of 4 Z rounded up to 16.
        condition_type: ``"class"`` or ``"attributes"``.
        num_classes: labels without the null label ("class").
        num_condition_tokens: number of slots, T ("attributes").
        num_attributes: attribute ids, 0 = unspecified included ("attributes").
        head_depth: blocks of the head.
        head_width: width of the head.
        num_sampling_steps: steps of a chain, see ``spaced_timesteps``.
        last_timestep: training step at which chains start; None = the last one.
        prediction_type: ``"epsilon"`` (published) or ``"v_prediction"``, see ``DiffusionHead``.
        diffusion_batch_mul: times drawn a token in training.
        input_noise: spread of the noise added to the tokens read in training, so that the model forgives its own errors.
        dropout: behind projections, in training.
        class_dropout_prob: probability of training a sample without its condition.
    """

    config_name = "config.json"
    features = frozenset({Feature.CONTINUOUS, Feature.CONTINUOUS_WINDOW, Feature.RAGGED})
    _supports_gradient_checkpointing = True
    _no_split_modules = ("TransformerBlock",)

    @checked(CAUSAL_MAR)
    @register_to_config
    def __init__(
        self,
        grid_size: tuple[int, int] = (16, 16),
        latent_channels: int = 16,
        patch_size: int = 1,
        dim: int = 768,
        num_layers: int = 24,
        num_heads: int = 12,
        ffn_dim: int | None = None,
        condition_type: Literal["class", "attributes"] = "class",
        num_classes: int = 1000,
        num_condition_tokens: int = 0,
        num_attributes: int = 0,
        head_depth: int = 6,
        head_width: int = 1024,
        num_sampling_steps: str = "100",
        last_timestep: int | None = None,
        prediction_type: str = "epsilon",
        diffusion_batch_mul: int = 4,
        input_noise: float = 0.0,
        dropout: float = 0.1,
        class_dropout_prob: float = 0.1,
    ) -> None:
        super().__init__()
        self.grid_size = grid_size
        if condition_type == "class":
            self.cls_embedding: Any = ClassEmbedding(num_classes, dim, class_dropout_prob)
        else:
            self.cls_embedding = AttributeEmbedding(num_attributes, num_condition_tokens, dim)
        token_dim = latent_channels * patch_size**2
        self.z_proj = nn.Linear(token_dim, dim)
        ffn_dim = ffn_dim or swiglu_dim(dim, 16, None)
        self.layers = nn.ModuleList(
            TransformerBlock(dim, num_heads, num_heads, ffn_dim, 1e-6, dropout, dropout) for _ in range(num_layers)
        )
        self.norm = RMSNorm(dim, 1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.diffloss = DiffusionHead(
            token_dim, dim, head_depth, head_width, num_sampling_steps, last_timestep, prediction_type
        )
        self._rope = DeviceTables()
        self.make_tables(torch.device("cpu"))

    def rope_table(self, device: torch.device | None = None) -> Tensor:
        """[T + N + 1, d / 2, 2]: condition rows, the grid, and a NULL row that equals the condition's."""
        return self._rope.get(self.device if device is None else device, self._rotations)[0]

    def _rotations(self) -> tuple[Tensor, ...]:
        head_dim = self.config.dim // self.config.num_heads
        condition = constant_rows(self.num_condition_tokens, head_dim, "identity")
        return (torch.cat([condition, grid_table(self.grid_size, head_dim, 10000.0), condition[:1]]),)

    @runs_as_forward
    def embed(self, codes: Tensor) -> Tensor:
        """Tokens ``[..., D]`` to ``[..., Z]``."""
        return self.z_proj(codes.to(compute_dtype(self.z_proj)))

    def forward(
        self, tokens: Tensor, condition: Any, *, drop: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """States of all positions under teacher forcing.

        In training mode conditions are dropped: with ``drop`` as given, else drawn from ``generator`` (or the global one).

        Args:
            tokens: [B, n, D], n <= N.
            condition: class ids [B] or attribute ids [B, T].
            drop: [B] bool, True = train without condition.
            generator: for drops and input noise.

        Returns:
            z [B, n, Z]; row i knows the condition and tokens < i.
        """
        rows, _ = self.embed_condition(condition, drop, generator)
        if self.training and self.config.input_noise > 0:
            where = tokens.device if generator is None else generator.device
            noise = torch.randn(tokens.shape, generator=generator, device=where).to(tokens)
            tokens = tokens + self.config.input_noise * noise
        x = torch.cat([rows, self.embed(tokens[:, :-1])], dim=1)
        h = self.forward_full(x, positions=torch.arange(x.shape[1], device=x.device), is_causal=True)
        return self.norm(h[:, self.num_condition_tokens - 1 :])

    def loss(self, tokens: Tensor, condition: Any, *, generator: torch.Generator | None = None) -> Tensor:
        """The training loss of a batch of clean tokens [B, N, D]."""
        z = self(tokens, condition, generator=generator)
        repeats = self.config.diffusion_batch_mul
        return self.diffloss.loss(tokens.flatten(0, 1), z.flatten(0, 1), repeats=repeats, generator=generator)

    def _score(self, h: Tensor, branches: int, hidden: bool, last: bool = False) -> StepOut:
        """``logits`` of a step are the states z ``[G, B, W, Z]``."""
        z = self.norm(h[:, -1:] if last else h)
        return StepOut(z.unflatten(0, (branches, -1)))
