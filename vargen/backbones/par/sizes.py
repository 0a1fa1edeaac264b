"""What the shapes of a PAR checkpoint tell about its configuration (arXiv:2412.15119); the sizes are LlamaGen's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vargen.backbones.llamagen.sizes import infer_config
from vargen.checkpoints.bounds import read_shape


def infer_par_config(state_dict: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Read a PAR configuration off the shapes; ``given`` settles what shapes cannot tell."""
    special = read_shape(state_dict, "spe_tok_embeddings.special_embeddings.weight", 2)[0]
    config = infer_config(state_dict, {"group_size": special + 1, **given})
    config.pop("num_kv_heads")
    return config
