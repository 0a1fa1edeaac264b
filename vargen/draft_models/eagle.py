"""EAGLE drafters: predict the target's next hidden state from the last one and the code behind it (arXiv:2401.15077).

One transformer block reads pairs (hidden state of the target at position i, code i + 1) and returns an estimate of hidden
state i + 1, which the target's own head turns into the distribution of the code after that. The parameter names are those of the
drafters published with LANTERN for LlamaGen (arXiv:2410.03355). The published drafters for Chameleon models (Anole) have
another block and are refused by name.

Letters: B images, G guidance branches, R = G * B rows, T condition positions, N codes, D width, V codes of the codebook,
w pairs of one forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vargen.backbones.layers.cache.kv_cache import Attend, attention
from vargen.backbones.layers.rope import constant_rows, grid_table, rotate, spread
from vargen.backbones.layers.tables import DeviceTables
from vargen.backbones.layers.transformer import RMSNorm
from vargen.backbones.settings.discrete import EAGLE
from vargen.checkpoints.bounds import check_given, count_layers, read_shape
from vargen.checkpoints.reader import CheckpointError, build_strict, load_original
from vargen.draft_models.eagle_drafts import EagleDrafts
from vargen.features import Feature
from vargen.hooks import HookedModel, compute_dtype, runs_as_forward
from vargen.validation.checks import checked
from vargen.validation.folders import Stored

PUBLISHED_HEADS = {1280: 20}  # width -> heads: LlamaGen-XL, the only size with a published drafter


class EagleAttention(nn.Module):
    """Self-attention of a drafter, without biases."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, rope: Tensor, attend: Attend) -> Tensor:
        """Attend from and to ``x [R, w, D]``; ``rope`` as in ``rotate``."""
        query, key, value = (p(x).unflatten(-1, (self.num_heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        query, key = rotate(query, rope), rotate(key, rope)
        y = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        return self.o_proj(y.transpose(1, 2).flatten(2))


class EagleMLP(nn.Module):
    """SwiGLU, without biases."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.up_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.down_proj = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each pair on its own."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class EagleLayer(nn.Module):
    """Attention without a norm in front (the pairs come from a linear layer), then a normed feed-forward."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, norm_eps: float) -> None:
        super().__init__()
        self.self_attn = EagleAttention(dim, num_heads)
        self.mlp = EagleMLP(dim, ffn_dim)
        self.post_attention_layernorm = RMSNorm(dim, norm_eps)

    def forward(self, x: Tensor, rope: Tensor, attend: Attend) -> Tensor:
        """Map ``x [R, w, D]`` to ``[R, w, D]``."""
        x = x + self.self_attn(x, rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class EagleDrafter(HookedModel, Stored, ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A drafter that stands on the hidden states of one backbone.

    Args:
        dim: D, the backbone's.
        num_heads: heads; D / num_heads must be a multiple of 4.
        ffn_dim: hidden width of the feed-forward.
        num_layers: blocks; published drafters have one.
        codebook_size: V, the backbone's.
        grid_size: (height, width) in codes, the backbone's.
        num_condition_tokens: T, the backbone's; the pairs of the first T - 1 positions hold placeholders for codes.
        own_embeddings: hold code embeddings (published drafters); False reads the backbone's, which saves V * D numbers.
        bias: of the layer that joins embedding and hidden state.
        rope_base: longest rotary period.
        norm_eps: of the RMS norms.
        condition_rope: "zero" as published (placeholders have zero queries and keys) or "identity".
    """

    config_name = "config.json"
    _supports_gradient_checkpointing = False

    @checked(EAGLE)
    @register_to_config
    def __init__(
        self,
        dim: int = 1280,
        num_heads: int = 20,
        ffn_dim: int = 3584,
        num_layers: int = 1,
        codebook_size: int = 16384,
        grid_size: tuple[int, int] = (16, 16),
        num_condition_tokens: int = 120,
        own_embeddings: bool = True,
        bias: bool = True,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-6,
        condition_rope: Literal["zero", "identity"] = "zero",
    ) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.codebook_size = codebook_size
        if own_embeddings:
            self.embed_tokens = nn.Embedding(codebook_size, dim)
        self.fc = nn.Linear(2 * dim, dim, bias=bias)
        self.layers = nn.ModuleList(EagleLayer(dim, num_heads, ffn_dim, norm_eps) for _ in range(num_layers))
        self._rope = DeviceTables()
        self.rope_table(torch.device("cpu"))

    @classmethod
    def from_original(cls, checkpoint: Any, **config: Any) -> EagleDrafter:
        """Load a drafter published with LANTERN strictly.

        Args:
            checkpoint: path (``pytorch_model.bin``, ``model.safetensors``) or state dict.
            config: ``grid_size`` always; ``num_heads`` unless the width is that of a published drafter; anything else
                overrides what the shapes tell.

        Raises:
            CheckpointError: not such a file, missing or extra keys, wrong shapes.
            ValueError: ``grid_size`` or ``num_heads`` missing.
        """
        config = check_given(cls, config)
        state_dict = load_original(checkpoint)
        config = {**infer_config(state_dict), **config}
        if "grid_size" not in config:
            raise ValueError("give grid_size=(height, width) in codes, for example (16, 16); the file does not tell")
        if "num_heads" not in config:
            raise ValueError(f"give num_heads; only the width {config['dim']} is in the file")
        return build_strict(lambda: cls(**config), state_dict).eval()

    @property
    def num_pairs(self) -> int:
        """Pairs of a whole image: T - 1 placeholders, then one a code."""
        return self.config.num_condition_tokens - 1 + self.grid_size[0] * self.grid_size[1]

    @runs_as_forward
    def embed(self, codes: Tensor, backbone: Any = None) -> Tensor:
        """Embeddings of codes, ``[...]`` int64 to ``[..., D]``."""
        return self.embed_tokens(codes) if self.config.own_embeddings else backbone.embed(codes)

    def rope_table(self, device: torch.device | None = None) -> Tensor:
        """[num_pairs + 1, d / 2, 2] float32; the last row serves pairs behind the image and wipes them."""
        return self._rope.get(self.device if device is None else device, self._rotations)[0]

    def _rotations(self) -> tuple[Tensor, ...]:
        c = self.config
        head_dim = c.dim // c.num_heads
        condition = constant_rows(c.num_condition_tokens - 1, head_dim, c.condition_rope)
        grid = grid_table(self.grid_size, head_dim, c.rope_base)
        return (torch.cat([condition, grid, constant_rows(1, head_dim, "zero")]),)

    def forward(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """Predict hidden states of a whole sequence, in causal order.

        Args:
            hidden: [R, w, D] hidden states of the target as they enter its head, positions 0..w-1.
            embeddings: [R, w, D] of the codes behind them, see ``embed``.

        Returns:
            [R, w, D]; row i estimates hidden state i + 1.
        """
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        attend = partial(attention, is_causal=True)
        return self.run(hidden, embeddings, positions, [attend] * len(self.layers))

    @runs_as_forward
    def run(self, hidden: Tensor, embeddings: Tensor, positions: Tensor, attends: list[Attend]) -> Tensor:
        """Run the blocks; ``positions [w]`` or ``[R, w]`` count pairs, each block has its own attention function."""
        x = self.fc(torch.cat([embeddings, hidden], dim=-1).to(compute_dtype(self.fc)))
        rope = spread(self.rope_table(positions.device)[positions.clamp(max=self.num_pairs)])
        for layer, attend in zip(self.layers, attends, strict=True):
            x = layer(x, rope, attend)
        return x

    def check_backbone(self, backbone: Any) -> None:
        """Raise ``ValueError`` unless this drafter was made for a backbone of these sizes."""
        missing = [name for name in ("output", "hidden_size", "num_condition_tokens") if not hasattr(backbone, name)]
        if missing or Feature.HIDDEN not in backbone.features:
            lacks = ", ".join(missing) or "hidden states"
            raise ValueError(
                f"an EAGLE drafter needs a backbone with hidden states and a head, this one lacks {lacks}"
            )
        mine = (self.config.dim, self.codebook_size, self.grid_size, self.config.num_condition_tokens)
        theirs = (
            backbone.hidden_size,
            backbone.codebook_size,
            tuple(backbone.grid_size),
            backbone.num_condition_tokens,
        )
        if mine != theirs:
            names = "(width, codebook, grid, condition positions)"
            raise ValueError(f"the drafter was made for a backbone of {names} {mine}, this one has {theirs}")

    def open_drafts(self, backbone: Any, *, branches: int, batch: int, max_nodes: int) -> EagleDrafts:
        """Start drafting for a batch of images.

        Args:
            backbone: the target; its ``output`` is the head.
            branches: G.
            batch: B.
            max_nodes: most nodes ever drafted between two verifications.

        Raises:
            ValueError: drafter and backbone do not fit.
        """
        self.check_backbone(backbone)
        return EagleDrafts(self, backbone, branches, batch, max_nodes)


def infer_config(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read what the shapes of a published drafter tell.

    Raises:
        CheckpointError: not the keys of a LlamaGen drafter.
    """
    if any(".q_norm." in key or ".input_layernorm." in key for key in state_dict):
        raise CheckpointError(
            "this is a LANTERN drafter of a Chameleon model (Anole, Lumina-mGPT); vargen loads those of LlamaGen"
        )
    needed = ("embed_tokens.weight", "fc.weight", "layers.0.mlp.gate_proj.weight")
    missing = [key for key in needed if key not in state_dict]
    if missing:
        raise CheckpointError(
            f"not an EAGLE drafter: it lacks {', '.join(missing)}; pass a file published with LANTERN"
        )
    num_codes, dim = read_shape(state_dict, "embed_tokens.weight", 2)
    config = {
        "dim": dim,
        "codebook_size": num_codes,
        "ffn_dim": read_shape(state_dict, "layers.0.mlp.gate_proj.weight", 2)[0],
        "num_layers": count_layers(state_dict, "layers."),
        "bias": "fc.bias" in state_dict,
    }
    return {**config, "num_heads": PUBLISHED_HEADS[dim]} if dim in PUBLISHED_HEADS else config
