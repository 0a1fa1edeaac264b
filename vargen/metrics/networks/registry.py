"""Networks whose features the distances compare, found by name: ``inception`` and ``lite0``, or any module.

Nothing is downloaded. ``inception`` is a file that the user has; ``lite0`` comes with the optional extra ``metrics``.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vargen.files import file_digest
from vargen.images import check_unit_range
from vargen.metrics.networks.weights import load_state, state_digest
from vargen.validation.printable import printable

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_VARIABLE = "VARGEN_INCEPTION_WEIGHTS"
NAMES = ("inception", "lite0")


def module_dtype(module: nn.Module) -> torch.dtype:
    """Floating dtype of a module's weights; float32 where it has none."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


class FeatureNetwork(nn.Module):
    """A frozen network with one layer tapped: ``[B, 3, H, W]`` uint8, or float in [0, 1], to ``[B, num_features]``.

    ``name`` and ``tap`` say which network and layer, ``resize`` how images reach its input size, ``weights`` the first
    eight hex digits of the SHA-256 of its weights ("" where unknown). All of them are copied into every result.
    """

    def __init__(
        self, body: nn.Module, *, name: str, tap: str, num_features: int, resize: str, weights: str = ""
    ) -> None:
        super().__init__()
        self.body = body
        self.name, self.tap, self.num_features, self.resize, self.weights = name, tap, num_features, resize, weights
        self.weights_file: Path | None = None  # where they came from: another tap can be had of the same file
        self.requires_grad_(False)
        self.eval()

    @property
    def label(self) -> str:
        """Suffix of metric names, e.g. ``"Lite0-112"``."""
        return f"{self.name[:1].upper()}{self.name[1:]}-{self.num_features}"

    @property
    def is_fid_network(self) -> bool:
        """Whether a Frechet distance over these features may be called FID."""
        return self.name == "inception" and self.tap == "2048"

    @property
    def frechet_name(self) -> str:
        """ "FID", "sFID" for its spatial layer, otherwise "FD-" and the network."""
        names = {("inception", "2048"): "FID", ("inception", "spatial"): "sFID"}
        return names.get((self.name, self.tap), f"FD-{self.label}")

    def digest(self) -> str:
        """Return hex digits that change with layer, resize and weights."""
        weights = self.weights or state_digest(self)  # a module of the user has no file
        text = f"{self.name} {self.tap} {self.num_features} {self.resize} {weights}"
        if module_dtype(self) != torch.float32:
            text += f" {module_dtype(self)}"
        return hashlib.sha256(text.encode()).hexdigest()

    def train(self, mode: bool = True) -> FeatureNetwork:
        """Stay in evaluation mode: a metric's ``train()`` would otherwise switch batch norms to batch statistics."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Compute features.

        Args:
            images: ``[B, 3, H, W]``, uint8 or float in [0, 1].

        Returns:
            ``[B, num_features]`` float32.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [B, 3, H, W], got {tuple(images.shape)}")
        if images.dtype != torch.uint8:
            if not images.is_floating_point():
                raise ValueError(f"images must be uint8 or float in [0, 1], got {images.dtype}")
            check_unit_range(images)
        pixels = images.float() if images.dtype == torch.uint8 else images.float() * 255
        if len(images) == 0:
            return pixels.new_zeros(0, self.num_features)
        features = self.body(pixels.to(module_dtype(self))).float()
        if features.shape != (len(images), self.num_features):
            raise ValueError(
                f"features of {self.name} must be {(len(images), self.num_features)}, got {tuple(features.shape)}"
            )
        return features.float()


class _ModuleBody(nn.Module):
    """Feed a user's module what it was written for: float pixels in [0, 1]."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, pixels: Tensor) -> Tensor:
        """Return ``[B, d]`` features."""
        features = self.module(pixels / 255)
        return features[None] if features.ndim == 1 else features.flatten(1)


def feature_network(
    name: str | nn.Module,
    weights: str | Path | None = None,
    *,
    tap: str | None = None,
    size: int | None = None,
    antialias: bool = True,
) -> FeatureNetwork:
    """Return a frozen feature network by name, or wrap a module.

    Args:
        name: ``"lite0"`` (EfficientNet-Lite0, extra ``metrics``), ``"inception"`` (the 2015-12-05 network of FID, a
            file that you supply) or a module that maps ``[B, 3, H, W]`` float in [0, 1] to ``[B, d]``.
        weights: file with the weights; default: see ``inception_weights``, or the file of the installed extra.
        tap: layer. lite0: ``"low"`` 40, ``"mid"`` 112 (default), ``"pool"`` 1280, ``"logits"`` 1000; inception:
            ``"64"``, ``"192"``, ``"768"``, ``"spatial"`` 2023 (sFID), ``"2048"`` (default), ``"logits_unbiased"`` 1008, ``"logits"`` 1008.
        size: side to which images are resized; lite0 only, default 128.
        antialias: inception only: True resizes as torchmetrics does, False as TensorFlow 1 and torch-fidelity did.

    Raises:
        ValueError: unknown name or tap, missing or wrong weights.
    """
    if isinstance(name, FeatureNetwork):
        return name
    if isinstance(name, nn.Module):
        return _wrap(name)
    if name == "lite0":
        return _lite0(weights, tap or "mid", size or 128)
    if name == "inception":
        if size not in (None, 299):
            raise ValueError(f"inception resizes to 299, got size={size}; leave size out")
        return _inception(weights, tap or "2048", antialias)
    raise ValueError(f"feature network must be one of {', '.join(NAMES)} or a torch module, got {name!r}")


def inception_weights(path: str | Path | None = None) -> Path:
    """Find the user's copy of the Inception weights and check its digest; never downloads.

    Looked up in this order: ``path``, the environment variable VARGEN_INCEPTION_WEIGHTS, the checkpoint folder of
    torch.hub.
    """
    places = [Path(p) for p in (path, os.environ.get(INCEPTION_VARIABLE)) if p]
    places = places[:1] or [Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE]
    file = places[0] / INCEPTION_FILE if places[0].is_dir() else places[0]
    wanted = INCEPTION_FILE.rsplit("-", 1)[1][:8]
    if not file.is_file():
        raise ValueError(
            f"the Inception network of FID needs {INCEPTION_FILE} (SHA-256 starts with {wanted}): not found at {file}; "
            f"pass weights=FILE, set {INCEPTION_VARIABLE}, or use the network lite0"
        )
    found = file_digest(file)
    if not found.startswith(wanted):
        raise ValueError(
            f"{file} is not {INCEPTION_FILE}: its SHA-256 starts with {found[:8]}, expected {wanted}; fetch the file again"
        )
    return file


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict without unpickling anything but tensors; one clear line for any other file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = printable((str(error).splitlines() or [type(error).__name__])[0])
        raise ValueError(f"{printable(path)} is not a readable weights file: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} must hold a state dict of tensors, got {type(state).__name__}")
    return state


def _tap(tap: str, dims: dict[str, int], name: str) -> str:
    if tap not in dims:
        raise ValueError(f"tap of {name} must be one of {', '.join(dims)}, got {tap!r}")
    return tap


def _lite0(weights: str | Path | None, tap: str, size: int) -> FeatureNetwork:
    from vargen.metrics.networks.lite0 import LiteBody, lite0_weights

    if size < 32:
        raise ValueError(f"size must be at least 32, got {size}")
    tap = _tap(tap, LiteBody.dims, "lite0")
    file = lite0_weights(weights)
    body = LiteBody(load_weights(file), tap=tap, size=size)
    resize = f"bicubic antialias to {size}x{size}"
    return _from_file(body, file, name="lite0", tap=tap, num_features=body.dims[tap], resize=resize)


def _from_file(body: nn.Module, file: Path, **fields: Any) -> FeatureNetwork:
    network = FeatureNetwork(body, weights=file_digest(file)[:8], **fields)
    network.weights_file = file
    return network


def _inception(weights: str | Path | None, tap: str, antialias: bool) -> FeatureNetwork:
    from vargen.metrics.networks.inception import InceptionBody

    tap = _tap(tap, InceptionBody.dims, "inception")
    file = inception_weights(weights)
    body = InceptionBody(tap=tap, antialias=antialias)
    load_state(body.network, load_weights(file), "the Inception network of FID")
    resize = "bilinear antialias (torchmetrics)" if antialias else "bilinear TensorFlow 1 (torch-fidelity)"
    resize += " to 299x299"
    return _from_file(body, file, name="inception", tap=tap, num_features=body.dims[tap], resize=resize)


def _wrap(module: nn.Module) -> FeatureNetwork:
    module.eval()
    width: Any = getattr(module, "num_features", None)
    if width is None:
        with torch.no_grad():  # two images, as batch norms and squeezes may trip over one
            width = module(torch.zeros(2, 3, 32, 32)).flatten(1).shape[1]
    return FeatureNetwork(
        _ModuleBody(module), name=type(module).__name__, tap="output", num_features=int(width), resize="none (module)"
    )
