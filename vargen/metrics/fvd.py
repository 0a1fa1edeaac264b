"""Frechet video distance (Unterthiner et al., 2018, arXiv:1812.01717), under one of the field's protocols.

The number is called FVD only when I3D with a user's weights file computed it. Without that file there are two offline
networks, for tests and for comparing models of this library with each other: ``"lite0"`` (EfficientNet-Lite0 features of
every second frame and their change, named FD-frames) and ``"random"`` (I3D with random weights, named FD-random-I3D).

Letters: B clips, T frames, H W sides, D features.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vargen.files import file_digest
from vargen.metrics.frechet import FrechetDistance, frechet_distance
from vargen.metrics.networks.i3d import I3D, MIN_FRAMES
from vargen.metrics.networks.registry import feature_network, load_weights, module_dtype
from vargen.metrics.networks.weights import load_state
from vargen.metrics.results import FrechetResult, protocol

Protocol = Literal["styleganv", "larp", "nbp"]
Covariance = Literal["n", "n-1"]
I3D_FILE = "i3d_pretrained_400.pt"
_RESIZES = {
    "styleganv": "frames to 224x224 (styleganv)",
    "larp": "frames to 224x224 (larp)",
    "nbp": "shorter side to 224, centre crop (nbp)",
}
_FEW = 400  # clips below which a covariance of 400 features has no full rank


@dataclass(frozen=True, kw_only=True)
class FrechetVideoResult(FrechetResult):
    """A Frechet distance between clips; ``num_reference`` and ``num_generated`` count clips."""

    frames: int  # of each clip that were read
    cov: str  # covariances are divided by "n" or "n-1"


class VideoFeatures(nn.Module):
    """A frozen network over clips: ``[B, 3, T, H, W]`` in [0, 1] to ``[B, D]``; ``name`` is that of the distance."""

    def __init__(
        self,
        body: nn.Module,
        *,
        name: str,
        num_features: int,
        min_frames: int,
        weights: str = "",
        network: str = "",
        tap: str = "output",
        resize: str = "none",
    ) -> None:
        super().__init__()
        self.network, self.tap, self.resize = network or type(body).__name__, tap, resize
        self.body, self.name, self.num_features = body, name, num_features
        self.min_frames, self.weights = min_frames, weights
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> VideoFeatures:
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, clips: Tensor) -> Tensor:
        """Compute features ``[B, D]`` float32."""
        return self.body(clips.to(module_dtype(self))).float()


class _I3DBody(nn.Module):
    """I3D behind the resize of a protocol."""

    def __init__(self, network: I3D, protocol: Protocol) -> None:
        super().__init__()
        self.network, self.protocol = network, protocol

    def forward(self, clips: Tensor) -> Tensor:
        height, width = clips.shape[3:]
        frames = rearrange(clips, "b c t h w -> (b t) c h w")
        if self.protocol == "nbp":  # shorter side to 224, centre crop
            scale = 224 / min(height, width)
            size = [max(224, round(height * scale)), max(224, round(width * scale))]
            frames = F.interpolate(frames, size, mode="bilinear", align_corners=False)
            top, left = (size[0] - 224) // 2, (size[1] - 224) // 2
            frames = frames[..., top : top + 224, left : left + 224]
        else:
            frames = F.interpolate(frames, (224, 224), mode="bilinear", align_corners=False)
        return self.network(rearrange(frames * 2 - 1, "(b t) c h w -> b c t h w", b=len(clips)))


class _FrameBody(nn.Module):
    """Features of frames, and how they change: a mean over time and a mean absolute difference."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, clips: Tensor) -> Tensor:
        t = clips.shape[2]
        frames = self.network(rearrange(clips, "b c t h w -> (b t) c h w"))
        features = rearrange(frames, "(b t) d -> b t d", t=t)
        steps = features.diff(dim=1)
        # the sign of the first half against the second tells forth from back
        turn = features[:, t // 2 :].mean(1) - features[:, : t // 2].mean(1)
        return torch.cat([features.mean(1), steps.abs().mean(1), turn], dim=1)


def video_features(
    network: str | nn.Module = "i3d",
    weights: str | Path | None = None,
    *,
    protocol: Protocol = "styleganv",
    digest: str | None = None,
) -> VideoFeatures:
    """Return a frozen network over clips.

    Args:
        network: ``"i3d"`` (your file, see ``weights``), ``"lite0"`` (extra ``metrics``), ``"random"``, or a module that maps
            ``[B, 3, T, H, W]`` in [0, 1] to ``[B, D]`` and says D as ``num_features``.
        weights: ``i3d_pretrained_400.pt`` or the same keys in another file; a pickle builds tensors alone.
        protocol: how clips reach I3D.
        digest: first hex digits of the SHA-256 that the file must have; None = any file whose names and shapes fit.

    Raises:
        ValueError: unknown network, no file or a wrong one.
    """
    if isinstance(network, nn.Module):
        width = getattr(network, "num_features", None)
        if width is None:
            raise ValueError("a network over clips needs the attribute num_features, its number of features")
        return VideoFeatures(network, name=f"FD-{type(network).__name__}", num_features=int(width), min_frames=1)
    if network == "i3d":
        body, found = I3D(), _checked_file(weights, digest)
        load_state(body, load_weights(found[0]), "I3D of FVD")
        fields: dict[str, Any] = {"name": "FVD", "weights": found[1][:8], "network": "i3d"}
        fields |= {"tap": "logits", "resize": _RESIZES[protocol]}
        return VideoFeatures(_I3DBody(body, protocol), num_features=400, min_frames=MIN_FRAMES, **fields)
    if network == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            body = I3D()
        wrapped = _I3DBody(body.eval(), protocol)
        fields = {"name": "FD-random-I3D", "network": "random-i3d", "tap": "logits", "resize": _RESIZES[protocol]}
        return VideoFeatures(wrapped, num_features=400, min_frames=MIN_FRAMES, **fields)
    if network == "lite0":
        frames = feature_network("lite0", weights)
        width = 3 * frames.num_features
        fields = {"name": "FD-frames", "network": "lite0-frames", "tap": frames.tap, "resize": frames.resize}
        return VideoFeatures(_FrameBody(frames), num_features=width, min_frames=2, **fields)
    raise ValueError(f"network must be 'i3d', 'lite0', 'random' or a torch module, got {network!r}")


def _checked_file(weights: str | Path | None, digest: str | None) -> tuple[Path, str]:
    if weights is None or not Path(weights).is_file():
        where = "no weights were given" if weights is None else f"no file at {weights}"
        raise ValueError(f"FVD needs {I3D_FILE}: {where}; pass weights=FILE, or use network='lite0' (not FVD)")
    found = file_digest(weights)
    if digest is not None and not found.startswith(digest.lower()):
        raise ValueError(f"{weights} has SHA-256 {found[:8]}..., expected {digest}; fetch the file again")
    return Path(weights), found


class FrechetVideoDistance(FrechetDistance):
    """Frechet distance between features of real and generated clips, in float64.

    Args:
        network: as in ``video_features``; a ``VideoFeatures`` is taken as it is.
        weights: the I3D file.
        protocol: ``"styleganv"`` and ``"larp"`` resize whole frames to 224, ``"nbp"`` the shorter side, then crops.
        cov: divide covariances by n (StyleGAN-V, LARP) or n - 1 (NBP); None = what the protocol does.
        frames: the first so many frames of every clip are read.
        digest: of the weights file, see ``video_features``.

    Example:
        >>> FrechetVideoDistance("random", frames=9).metric_name
        'FD-random-I3D'
    """

    def __init__(
        self,
        network: str | nn.Module = "i3d",
        weights: str | Path | None = None,
        *,
        protocol: Protocol = "styleganv",
        cov: Covariance | None = None,
        frames: int = 16,
        digest: str | None = None,
        **kwargs: Any,
    ) -> None:
        if protocol not in get_args(Protocol):
            raise ValueError(f"protocol must be one of {', '.join(get_args(Protocol))}, got {protocol!r}")
        cov = cov or ("n-1" if protocol == "nbp" else "n")
        if cov not in get_args(Covariance):
            raise ValueError(f"cov must be 'n' or 'n-1', got {cov!r}")
        body = network
        if not isinstance(body, VideoFeatures):
            body = video_features(body, weights, protocol=protocol, digest=digest)
        if frames < body.min_frames:
            raise ValueError(f"frames must be at least {body.min_frames} for this network, got {frames}")
        super().__init__(cast(Any, body), **kwargs)
        self.protocol, self.cov, self.frames = protocol, cov, frames

    @property
    def metric_name(self) -> str:
        """ "FVD" for I3D with weights, otherwise a name that says what was compared."""
        return str(self.network.name)

    def update(self, clips: Tensor, real: bool) -> None:
        """Add clips ``[B, 3, T, H, W]``: uint8, or float in [0, 1] (rounded to 8 bits); T at least ``frames``.

        Raises:
            ValueError: wrong shape, type or range, too few frames.
        """
        if clips.ndim != 5 or clips.shape[1] != 3:
            raise ValueError(f"clips must be [B, 3, T, H, W], got {tuple(clips.shape)}")
        if clips.shape[2] < self.frames:
            raise ValueError(f"clips must have at least {self.frames} frames, got {clips.shape[2]}; lower frames")
        clips = clips[:, :, : self.frames]
        if clips.dtype != torch.uint8:
            if not clips.is_floating_point():
                raise ValueError(f"clips must be uint8 or float in [0, 1], got {clips.dtype}")
            if clips.numel() and not (0 <= float(clips.min()) and float(clips.max()) <= 1):
                low, high = float(clips.min()), float(clips.max())
                raise ValueError(f"clips must be in [0, 1], got {low:.3g} to {high:.3g}; map [-1, 1] by (x + 1) / 2")
            self.rounding_used = self.rounding
            clips = (clips * 255).round().to(torch.uint8)
        if len(clips):
            self.add_features(self.network(clips.float() / 255), real)

    def result(self, **fields: Any) -> FrechetVideoResult:
        """Return the distance with its protocol; ``fields`` may give the floor."""
        with self.sync_context(should_sync=self._to_sync, should_unsync=self._should_unsync):
            counts = self.statistics(True).count, self.statistics(False).count
        features: VideoFeatures = cast(Any, self.network)
        shared = protocol(self.network, self.rounding_used, *counts) | {"network": features.network}
        return FrechetVideoResult(
            metric=self.metric_name, value=float(self.compute()), frames=self.frames, cov=self.cov, **shared, **fields
        )

    def compute(self) -> Tensor:
        """Return the distance as a float64 scalar.

        Raises:
            ValueError: fewer than two clips on a side.
        """
        sides = [self.statistics(True), self.statistics(False)]
        counts = [side.count for side in sides]
        if min(counts) < 2:
            raise ValueError(f"{self.metric_name} needs at least 2 clips a side, got {counts[0]} real and {counts[1]}")
        if min(counts) < _FEW:
            warnings.warn(
                f"{self.metric_name} of {min(counts)} clips is biased: {_FEW} or more are wanted", stacklevel=2
            )
        scale = [(c - 1) / c if self.cov == "n" else 1.0 for c in counts]
        (a, b), (s, t) = sides, scale
        value = frechet_distance(a.mean, a.covariance * s, b.mean, b.covariance * t)
        return torch.tensor(value, dtype=torch.float64)
