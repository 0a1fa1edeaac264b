"""Next-token sampling: one code, one forward pass; the law that every exact sampler must reproduce."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vargen.samplers.window.decoder import WindowSampler


@dataclass(frozen=True, kw_only=True)
class NextTokenSampler(WindowSampler):
    """Draw code after code, each from the backbone's law given all codes before it.

    Every position has its own noise, a function of the image's seed alone, so an image does not depend on the batch
    around it.

    Example:
        >>> sampler = NextTokenSampler(guidance_scale=2.0, top_k=100)
        >>> sampler.replace(top_k=0).config["guidance_scale"]
        2.0
    """

    replayable: ClassVar[bool] = True
