"""What a backbone can do, and a sampler asks for. Importing this module is cheap: no torch."""

from __future__ import annotations

from enum import StrEnum


class Feature(StrEnum):
    """What a backbone can do, member by member; a sampler lists those it needs. Plain strings of these values do as well.

    Example:
        >>> from vargen import LlamaGenTransformer
        >>> Feature.TREE_MASK in LlamaGenTransformer.features
        True
    """

    WINDOW = "window"  # scores several codes in one forward: ``open``, ``step``, ``commit``, ``select``
    RAGGED = "ragged"  # images of one session may have different lengths: ``commit`` takes ``[B]``
    TREE_MASK = "tree_mask"  # ``step`` takes ``slots`` and ``mask``, ``commit`` takes ``path``
    ANY_SLOT = "any_slot"  # codes are fed in any order: ``step_at``
    HIDDEN = "hidden"  # ``open`` and ``step`` return hidden states
    STATIC = "static"  # sessions with fixed shapes, for CUDA graphs
    ROW_INVARIANT = (
        "row_invariant"  # ``open`` takes ``row_invariant=True``: results do not depend on what shares a forward
    )
    NEIGHBORS = "neighbors"  # schedules of anti-diagonals, one head an axis of the grid (NAR)
    GROUPS = "groups"  # schedules of groups of positions (PAR, any order)
    BLOCKS = "blocks"  # schedules of blocks (NBP)
    MASKED = "masked"  # bidirectional: codes that are not drawn are masked (MaskGIT)
    SCALES = "scales"  # scale after scale (VAR)
    CONTINUOUS = "continuous"  # tokens are vectors, drawn by a diffusion head or a flow
    CONTINUOUS_WINDOW = "continuous_window"  # as WINDOW, for vectors
    MASKED_CONTINUOUS = "masked_continuous"  # as MASKED, for vectors: ``predict`` (MAR)
    CELLS = "cells"  # cell after cell, each by a flow of the backbone itself (xAR)

    @classmethod
    def of(cls, backbone: object) -> frozenset[str]:
        """The features that a backbone, or its class, declares; none if it declares nothing."""
        return frozenset(getattr(backbone, "features", ()))
