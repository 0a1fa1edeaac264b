"""What official files of transformers contain: keys and shapes of the family's class, built on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from vargen.checkpoints.bounds import count_layers, read_shape
from vargen.checkpoints.manifests.base import Manifest, shapes_on_meta
from vargen.checkpoints.manifests.published import PARAMETERS

_BUFFERS = ("cls_embedding.uncond_embedding",)
_OPTIONAL = ("freqs_cis", "*.kv_cache.*")


# over LlamaGen's blocks


def _over_llamagen(
    state_dict: Mapping[str, Tensor],
    kind: Any,
    sizes: Mapping[str, tuple[int, int, int]],
    published: Mapping[str, int],
    infer: Callable[[Mapping[str, Tensor], Mapping[str, Any]], dict[str, Any]],
    *,
    extra_blocks: int = 0,
    prefix: str = "",
    given: Mapping[str, Any] | None = None,
    **config: Any,
) -> Manifest:
    """A published size by width and depth, else a model of the file's own sizes.

    Args:
        state_dict: names to tensors.
        kind: the class.
        sizes: name -> layers, heads, width.
        published: parameters of the names that were published.
        infer: state dict and what shapes cannot tell to a configuration.
        extra_blocks: blocks that the layers of ``sizes`` leave out.
        prefix: of the names in reports.
        given: what ``infer`` is given beside heads.
        config: of published sizes, beside what ``from_size`` knows.
    """
    width = read_shape(state_dict, "tok_embeddings.weight", 2)[1]
    found = (count_layers(state_dict, "layers.") - extra_blocks, width)
    names = (name for name, (layers, _, dim) in sizes.items() if (layers, dim) == found and name in published)
    size = None if "cls_embedding.slot_embedding.weight" in state_dict else next(names, None)
    if size is not None:
        shapes = shapes_on_meta(partial(kind.from_size, size, **config))
        return Manifest(shapes, prefix + size, published[size], _BUFFERS, _OPTIONAL)
    any_heads = {"num_heads": max(1, width // 4)}  # change no shape
    inferred = infer(state_dict, {"grid_size": (16, 16), **any_heads, **(given or {})})
    return Manifest(shapes_on_meta(partial(kind, **inferred)), None, None, _BUFFERS, _OPTIONAL)


def _text(state_dict: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("cls_embedding.cap_proj.") for name in state_dict)


def llamagen_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """LlamaGen, labels or captions."""
    from vargen.backbones.llamagen.model import LlamaGenTransformer
    from vargen.backbones.llamagen.sizes import SIZES, infer_config

    text = _text(state_dict)
    counts = PARAMETERS["llamagen-t2i" if text else "llamagen-c2i"]
    kind = "caption" if text else "class"
    return _over_llamagen(
        state_dict, LlamaGenTransformer, SIZES, counts, infer_config, prefix="GPT-", condition_type=kind
    )


def nar_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """NAR of images, labels or captions."""
    from vargen.backbones.nar.model import NARTransformer
    from vargen.backbones.nar.sizes import IMAGE_SIZES, infer_nar_config

    text = _text(state_dict)
    counts = PARAMETERS["nar-t2i" if text else "nar"]
    kind = "caption" if text else "class"
    return _over_llamagen(
        state_dict, NARTransformer, IMAGE_SIZES, counts, infer_nar_config, extra_blocks=1, condition_type=kind
    )


def nar_video_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """NAR of videos."""
    from vargen.backbones.nar.model import NARTransformer
    from vargen.backbones.nar.sizes import VIDEO_SIZES, infer_nar_config

    given = {"grid_size": (1, 1, read_shape(state_dict, "abs_pe", 3)[1] - 1)}
    counts = PARAMETERS["nar-video"]
    return _over_llamagen(
        state_dict, NARTransformer, VIDEO_SIZES, counts, infer_nar_config, extra_blocks=2, given=given
    )


def par_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """PAR, by the codes of a group."""
    from vargen.backbones.llamagen.sizes import SIZES
    from vargen.backbones.par.model import PARTransformer
    from vargen.backbones.par.sizes import infer_par_config

    group = read_shape(state_dict, "spe_tok_embeddings.special_embeddings.weight", 2)[0] + 1
    counts = {size: count for (size, codes), count in PARAMETERS["par"].items() if codes == group}
    given = {"grid_size": (8 * group, 8 * group)}
    return _over_llamagen(state_dict, PARTransformer, SIZES, counts, infer_par_config, given=given, group_size=group)


def randar_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """RandAR."""
    from vargen.backbones.llamagen.any_order import AnyOrderTransformer
    from vargen.backbones.llamagen.sizes import SIZES, infer_config

    return _over_llamagen(state_dict, AnyOrderTransformer, SIZES, PARAMETERS["randar"], infer_config)


# others


def var_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """VAR."""
    from vargen.backbones.var.model import VARTransformer
    from vargen.backbones.var.sizes import BUFFERS, infer_var_config, var_size_config

    config = infer_var_config(state_dict, {})
    size, counts = f"d{config['num_layers']}", PARAMETERS["var"]
    if size not in counts or config["dim"] != var_size_config(size)["dim"]:
        return Manifest(shapes_on_meta(partial(VARTransformer, **config)), None, None, BUFFERS, BUFFERS)
    return Manifest(shapes_on_meta(partial(VARTransformer.from_size, size)), size, counts[size], BUFFERS, BUFFERS)


def switti_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """Switti; whether scales see coarser ones changes no tensor."""
    from vargen.backbones.switti.model import SwittiTransformer
    from vargen.backbones.switti.sizes import BUFFERS, infer_switti_config, to_native, to_official

    given: dict[str, Any] = {"num_heads": 1, "autoregressive": False, "rope_extent": 128.0}  # change no shape
    count = read_shape(state_dict, "lvl_embed.weight", 2)[0]
    if count not in (10, 14):
        given["scales"] = (1,) * count
    config = infer_switti_config(to_native(state_dict), given)
    make = partial(SwittiTransformer, **{**config, "rope": config["rope"]})
    shapes = shapes_on_meta(make, to_official)
    size = {10: "512", 14: "1024"}.get(count) if (config["dim"], config["num_layers"]) == (1920, 30) else None
    if size is None:
        return Manifest(shapes, optional=BUFFERS)
    return Manifest(shapes, f"switti_{size}", PARAMETERS["switti"][size], optional=BUFFERS)


def mar_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """MAR."""
    from vargen.backbones.mar.model import MARTransformer
    from vargen.backbones.mar.sizes import SIZES, infer_mar_config, mar_size_config

    heads = {f"{part}_num_heads": 1 for part in ("encoder", "decoder")}  # change no shape
    config = infer_mar_config(state_dict, heads)
    shapes = shapes_on_meta(partial(MARTransformer, **config))
    size = next((n for n in SIZES if {**mar_size_config(n), **heads}.items() <= config.items()), None)
    if size is None or config["num_classes"] != 1000 or config["buffer_size"] != 64:
        return Manifest(shapes)
    return Manifest(shapes, f"mar_{size}", PARAMETERS["mar"][size])


def xar_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """xAR."""
    from vargen.backbones.xar.model import XARTransformer
    from vargen.backbones.xar.sizes import RECOMPUTED, SIZES, infer_xar_config

    config = infer_xar_config(state_dict, {"num_heads": 1})  # changes no shape
    shapes = shapes_on_meta(partial(XARTransformer, **config))
    found = (config["dim"], config["encoder_depth"])
    size = next((name for name, (dim, depth, _) in SIZES.items() if (dim, depth) == found), None)
    if size is None:
        return Manifest(shapes, optional=RECOMPUTED)
    return Manifest(shapes, f"xar_{size}", PARAMETERS["xar"][size], optional=RECOMPUTED)


def nbp_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """NBP with text, or of frame prediction."""
    from vargen.backbones.nbp.model import NBPTransformer
    from vargen.backbones.nbp.sizes import CODES, OTHERS, PREFIX, SIZES, TEXT, infer_nbp_config, official_weights

    weights = official_weights(state_dict)
    rows = read_shape(weights, "tok_emb.weight", 2)[0]
    given = {"num_heads": 1}  # changes no shape
    if read_shape(weights, "uncond_embedding", 2, least=0)[0] and rows not in TEXT:
        given["codebook_size"] = max(rows - 1 - 16, 1)  # how the vocabulary divides changes no shape either
    config = infer_nbp_config(weights, given)
    found = (config["num_layers"], config["dim"])
    size = next((name for name, (layers, _, dim) in SIZES.items() if (layers, dim) == found), None)
    size = size if rows in (*TEXT, CODES) else None
    counts = PARAMETERS["nbp" if config["condition_type"] == "text" else "nbp-frames"]
    shapes = {PREFIX + name: shape for name, shape in shapes_on_meta(partial(NBPTransformer, **config)).items()}
    optional = (*(name + "*" for name in OTHERS), "*mask*")
    return Manifest(shapes, size, counts[size] if size else None, (PREFIX + "uncond_embedding",), optional)


def infinity_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """Infinity, its blocks in chunks or not."""
    from vargen.backbones.infinity.model import RECOMPUTED, InfinityTransformer
    from vargen.backbones.infinity.sizes import SIZES, infer_infinity_config, to_native, to_official

    config = infer_infinity_config(to_native(state_dict), {})
    num_chunks = max(1, count_layers(state_dict, "block_chunks.", least=0))
    make = partial(InfinityTransformer, **{**config, "scales": (1,)})  # scales change no shape
    shapes = shapes_on_meta(make, partial(to_official, num_chunks=num_chunks))
    found = tuple(config[name] for name in ("num_layers", "dim", "num_heads", "num_bits"))
    size = next((name for name, sizes in SIZES.items() if sizes == found), None)
    if size is None or (config["text_dim"], config["text_length"]) != (2048, 512):
        return Manifest(shapes, optional=RECOMPUTED)
    return Manifest(shapes, f"infinity_{size}", PARAMETERS["infinity"][size], optional=RECOMPUTED)
