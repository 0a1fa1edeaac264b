"""What official files of tokenizers contain: keys and shapes of the family's class, built on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from vargen.checkpoints.bounds import CheckpointError, read_shape
from vargen.checkpoints.manifests.base import Manifest, Shape, shapes_on_meta
from vargen.checkpoints.manifests.published import PARAMETERS

MAX_SCALES = 64  # as ``check_scales`` allows
VAE_CHANNELS = 160  # of the one published multi-scale tokenizer
KL16_WIDTHS = [128, 128, 256, 256, 512]
ONE_GROUP = {"norm_num_groups": 1}  # changes no shape and fits every width


def vq_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """LlamaGen's tokenizers."""
    from vargen.tokenizers.vq.checkpoints import IGNORED, infer_config
    from vargen.tokenizers.vq.model import SIZES

    config = infer_config(state_dict)
    named = (n for n, c in SIZES.items() if c["channel_multipliers"] == config["channel_multipliers"])
    size = next(named, None) if config["base_channels"] == 128 else None  # 128: the width of every published size
    if size is None:
        return Manifest(_vq_shapes(config), optional=IGNORED)
    return Manifest(_vq_shapes(SIZES[size]), size, PARAMETERS["llamagen-vq"][size], optional=IGNORED)


def taming_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """VQGANs in the layout of taming-transformers; what trained them is ignored."""
    from vargen.tokenizers.vq.checkpoints import infer_config, llamagen_to_taming, taming_to_llamagen

    config = infer_config(taming_to_llamagen(state_dict))
    return Manifest(llamagen_to_taming(_vq_shapes(config)), optional=("loss.*",))


def _vq_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    from vargen.tokenizers.vq.model import VQTokenizer

    return shapes_on_meta(partial(VQTokenizer, **{**config, **ONE_GROUP}))


def multiscale_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """VAR's tokenizer in the official layout."""
    from vargen.tokenizers.multiscale_vq.checkpoints import HITS, infer_multiscale_config, to_native, to_official
    from vargen.tokenizers.multiscale_vq.model import MultiScaleVQTokenizer

    rows = read_shape(state_dict, HITS, 2)[0] if HITS in state_dict else 1
    if rows > MAX_SCALES:
        raise CheckpointError(f"{HITS} counts {rows} scales, at most {MAX_SCALES} are allowed")
    scales = list(range(1, rows + 1))  # shapes depend on how many there are only
    config = infer_multiscale_config(to_native(state_dict), {"scales": scales})
    if config["base_channels"] != VAE_CHANNELS:
        make = partial(MultiScaleVQTokenizer, **{**config, "scales": scales, **ONE_GROUP})
        return Manifest(shapes_on_meta(make, to_official), buffers=(HITS,))
    (size, count), *_ = PARAMETERS["var-vqvae"].items()
    shapes = shapes_on_meta(partial(MultiScaleVQTokenizer, scales=scales), to_official)
    return Manifest(shapes, size, count, buffers=(HITS,))


def kl_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """KL autoencoders in the latent-diffusion layout."""
    from vargen.tokenizers.kl.autoencoder import build_autoencoder, infer_kl_config, to_latent_diffusion

    config = infer_kl_config(state_dict)
    shapes = shapes_on_meta(partial(build_autoencoder, {**config, **ONE_GROUP}), to_latent_diffusion)
    if config["block_out_channels"] != KL16_WIDTHS or config["latent_channels"] != 16:
        return Manifest(shapes, optional=("loss.*",))
    (size, count), *_ = PARAMETERS["kl-autoencoder"].items()
    return Manifest(shapes, size, count, optional=("loss.*",))


def video_fsq_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """The one published tokenizer of NBP."""
    from vargen.tokenizers.video_fsq.model import VideoFSQTokenizer

    (size, count), *_ = PARAMETERS["nbp-tokenizer"].items()
    return Manifest(shapes_on_meta(VideoFSQTokenizer), size, count)


def bsq_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """Infinity's binary tokenizers, in either spelling."""
    from vargen.tokenizers.multiscale_bsq.checkpoints import RECOMPUTED, infer_bsq_config, to_native, to_official
    from vargen.tokenizers.multiscale_bsq.model import MultiScaleBSQTokenizer
    from vargen.tokenizers.vq.checkpoints import llamagen_to_taming

    config = infer_bsq_config(to_native(state_dict))
    make = partial(MultiScaleBSQTokenizer, **{**config, "scales": (1,), **ONE_GROUP})
    shapes = shapes_on_meta(make, to_official if "encoder.conv_in.conv.weight" in state_dict else llamagen_to_taming)
    size = f"d{config['codebook_dim']}"
    levels = [1, 2, 4, 4] if size == "d14" else [1, 2, 4, 4, 4]
    known = config["base_channels"] == 128 and config["channel_multipliers"] == levels  # 128: the published width
    count = PARAMETERS["infinity-vae"].get(size) if known else None
    return Manifest(shapes, size if count else None, count, optional=RECOMPUTED)
