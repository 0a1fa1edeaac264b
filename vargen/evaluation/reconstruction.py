"""How well a tokenizer gives images back: PSNR on all pixels and on the figure, and the distance to the originals."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from vargen.evaluation.conditions import check_num
from vargen.evaluation.features import Progress, extract, extract_cached
from vargen.evaluation.images import ImageSet, described, read_images
from vargen.evaluation.report import Report, environment
from vargen.images import Rounding, TensorImages, to_uint8
from vargen.metrics.frechet import statistics_distance
from vargen.metrics.heroes import draw_heroes
from vargen.metrics.networks.registry import FeatureNetwork, feature_network
from vargen.metrics.results import FrechetResult, protocol
from vargen.protocols import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ReconstructionResult:
    """How well a tokenizer gives images back, in dB on 8-bit pixels."""

    num_images: int
    psnr_all: float  # from the squared error pooled over all images and pixels
    psnr_mean: float  # mean over images of their own PSNR, as some tables print it
    psnr_hero: float | None  # pooled over the pixels that are not background; heroes only
    codes_used: int | None = None  # different codes among all images
    codebook_size: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


class Autoencoder(Tokenizer, Protocol):
    """A tokenizer that reads images too."""

    def encode(self, images: Tensor) -> Any:
        """Images in [-1, 1] to codes or, of a continuous tokenizer, to a distribution of latents."""
        ...


def psnr(squared_error: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of squared errors on the 0..255 scale, pooled over all of them."""
    mean = float(squared_error.double().mean())
    return math.inf if mean == 0 else 10 * math.log10(255**2 / mean)


def evaluate_reconstruction(
    tokenizer: Autoencoder,
    out: str | Path | None = None,
    *,
    num: int = 2000,
    reference: str | Path | ImageSet = "heroes",
    network: str | FeatureNetwork | None = "lite0",
    chunk: int = 64,
    rounding: Rounding = "nearest",
    model: str = "",
    progress: Progress | None = None,
) -> Report:
    """Encode and decode real images.

    Args:
        tokenizer: with ``encode(images).codes`` and ``decode(codes)`` over images in [-1, 1].
        out: folder for the report and a sheet of originals and reconstructions; None writes nothing.
        num: heroes to draw, or how many images of a folder or npz to take at most.
        reference: ``"heroes"`` (fresh ones of the test split), a folder, an npz, or what ``read_images`` returns.
        network: for the distance between reconstructions and originals; None leaves it out.
        chunk: images at a time.
        rounding: how reconstructions become 8 bits, before anything is measured.
        model: name for the report.
        progress: called as the work goes on.
    """
    if num < 2:
        raise ValueError(f"num must be at least 2, got {num}")
    check_num(num)
    heroes = draw_heroes(num, "reference") if str(reference) == "heroes" else None
    source: ImageSet = heroes.image_set("reference heroes") if heroes else read_images(reference)
    _check_size(source, num)
    originals, rebuilt, codes_used = _rebuild(tokenizer, source, num, chunk, rounding, progress)
    figure = heroes.figure[:, None] if heroes else None
    result = ReconstructionResult(
        num_images=len(originals),
        **_psnrs(originals, rebuilt, figure),
        codes_used=codes_used,
        codebook_size=getattr(tokenizer, "codebook_size", None),
    )
    distances = (
        [] if network is None else _distances(originals, rebuilt, network, rounding, heroes is not None, progress)
    )
    report = Report(
        kind="reconstruction",
        subject={"model": model, "tokenizer": type(tokenizer).__name__},
        protocol={"num": len(originals), "rounding": rounding, "reference": described(source)},
        results=[*(d.to_dict() for d in distances), result.to_dict()],
        environment=environment(tokenizer),
    )
    if out is not None:
        pairs = rearrange([originals[:32], rebuilt[:32]], "pair n c h w -> (n pair) c h w")
        report.write(out, grid=pairs)
    return report


def _check_size(source: ImageSet, num: int) -> None:
    """Refuse more pixels than fit into half the memory twice, as originals and as reconstructions."""
    count, (height, width) = min(num, source.num_images), source.shape
    most = _memory() // 2 // (6 * height * width)
    if count > most:
        raise ValueError(
            f"{count} images of {width}x{height} pixels do not fit into memory; take at most {most} of them (num, --num), "
            "or make them smaller"
        )


def _memory() -> int:
    """Bytes of memory of this machine; 8 GiB where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2**33


def _psnrs(originals: Tensor, rebuilt: Tensor, figure: Tensor | None) -> dict[str, Any]:
    """Pool squared errors over all pixels, image by image, and over the figure ``[N, 1, H, W]``; one image at a time."""
    sums, counts, each = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), []
    for index, (one, other) in enumerate(zip(originals, rebuilt, strict=True)):
        error = (one.int() - other.int()).square().double()
        mask = torch.ones_like(error) if figure is None else figure[index].expand_as(error).double()
        each.append(psnr(error))
        sums += torch.stack([error.sum(), (error * mask).sum()])
        counts += torch.stack([torch.tensor(error.numel()).double(), mask.sum()])
    overall, hero = (psnr(mean) for mean in sums / counts)
    return {"psnr_all": overall, "psnr_mean": sum(each) / len(each), "psnr_hero": None if figure is None else hero}


def _rebuild(
    tokenizer: Autoencoder, source: ImageSet, num: int, chunk: int, rounding: Rounding, progress: Progress | None
) -> tuple[Tensor, Tensor, int | None]:
    device = getattr(tokenizer, "device", torch.device("cpu"))
    dtype = getattr(tokenizer, "dtype", torch.float32)
    originals, rebuilt, used, done = [], [], set(), 0
    was_training = getattr(tokenizer, "training", False)
    if was_training:
        cast(nn.Module, tokenizer).eval()
    try:
        for batch in source.batches(chunk):
            batch = batch[: num - done]
            with torch.no_grad():
                codes, images = _round_trip(tokenizer, (batch.float() / 127.5 - 1).to(device, dtype))
            for part in codes:
                used.update(part.unique().tolist())
            originals.append(batch)
            rebuilt.append(to_uint8(images, rounding).cpu())
            done += len(batch)
            if progress is not None:
                progress("reconstructing", done, min(num, source.num_images))
            if done >= num:
                break
    finally:
        if was_training:
            cast(nn.Module, tokenizer).train()
    return torch.cat(originals), torch.cat(rebuilt), len(used) or None


def _round_trip(tokenizer: Autoencoder, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return codes, scale by scale (none for a continuous tokenizer), and reconstructions of images in [-1, 1]."""
    encoded = tokenizer.encode(images)
    if hasattr(encoded, "latent_dist"):  # diffusers' AutoencoderKL
        return [], tokenizer.decode(encoded.latent_dist.mode()).sample
    codes = encoded.codes
    return codes if isinstance(codes, list) else [codes], tokenizer.decode(codes)


def _distances(
    originals: Tensor,
    rebuilt: Tensor,
    network: str | FeatureNetwork,
    rounding: str,
    is_heroes: bool,
    progress: Progress | None,
) -> list[FrechetResult]:
    """Compare with the very originals, as the field's rFID does, and heroes with fresh ones, where a floor exists."""
    network = feature_network(network)
    real = extract_cached(TensorImages(originals, "originals"), network, progress=progress)
    copy = extract(TensorImages(rebuilt, "reconstructions"), network, progress=progress)
    name = network.frechet_name
    own = FrechetResult(
        metric=f"r{name}",
        value=statistics_distance(real.statistics, copy.statistics),
        **protocol(network, rounding, len(real), len(copy)),
    )
    if not is_heroes:
        return [own]
    fresh = extract_cached(draw_heroes(len(originals), "floor").image_set("fresh heroes"), network, progress=progress)
    against_fresh = FrechetResult(
        metric=f"{name} of reconstructions",
        value=statistics_distance(fresh.statistics, copy.statistics),
        floor=statistics_distance(fresh.statistics, real.statistics),
        floor_counts=(len(fresh), len(real)),
        floor_sets="the originals against fresh heroes",
        **protocol(network, rounding, len(fresh), len(copy)),
    )
    return [own, against_fresh]
