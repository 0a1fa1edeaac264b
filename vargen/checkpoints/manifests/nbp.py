"""What official NBP files contain (arXiv:2502.07737): transformers with text or of frame prediction, and the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vargen.checkpoints.bounds import read_shape
from vargen.checkpoints.manifests.base import Manifest

# size -> parameters with text (UCF-101 files) and of frame prediction (Kinetics-600 files), without the tokenizer in
# them; the paper rounds, and leaves out embeddings and head: 0.7, 1.2 and 3 billion
NBP_PARAMETERS = {
    "XL": (982_785_024, 884_431_872),
    "XXL": (1_612_369_920, 1_481_232_384),
    "3B": (4_230_813_696, 4_034_107_392),
}
TOKENIZER_PARAMETERS = 370_372_105
_OPTIONAL = ("first_stage_model.*", "lpips.*", "loss.*", "*mask*")


def nbp_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """Keys and shapes of an NBP transformer of the file's depth, width and vocabulary."""
    from vargen.backbones.nbp.model import NBPTransformer
    from vargen.backbones.nbp.sizes import PREFIX, SIZES, TEXT, infer_nbp_config, official_weights

    weights = official_weights(state_dict)
    rows = read_shape(weights, "tok_emb.weight", 2)[0]
    given = {"num_heads": 1}  # changes no shape
    if read_shape(weights, "uncond_embedding", 2, least=0)[0] and rows not in TEXT:
        given["codebook_size"] = max(rows - 1 - 16, 1)  # how the vocabulary divides changes no shape either
    config = infer_nbp_config(weights, given)
    size = next((name for name, (n, _, d) in SIZES.items() if (n, d) == (config["num_layers"], config["dim"])), None)
    text = config["condition_type"] == "text"
    if rows not in (*TEXT, 64000):
        size = None
    with torch.device("meta"):
        model = NBPTransformer(**config)
    shapes = {PREFIX + name: tuple(value.shape) for name, value in model.state_dict().items()}
    count = NBP_PARAMETERS[size][not text] if size else None
    return Manifest(shapes, size, count, (PREFIX + "uncond_embedding",), _OPTIONAL)


def nbp_tokenizer_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """Keys and shapes of the one published tokenizer."""
    from vargen.tokenizers.video_fsq.model import VideoFSQTokenizer

    with torch.device("meta"):
        model = VideoFSQTokenizer()
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return Manifest(shapes, "MAGVIT-v2", TOKENIZER_PARAMETERS)
