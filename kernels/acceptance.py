"""Acceptance rules, written once: plain operators, so that Triton kernels call them as device functions and the
PyTorch references through ``.fn``.

p is the target distribution, q the draft's, u uniform in [0, 1). Nothing else in the library compares p with q.
"""

from __future__ import annotations

from vargen.kernels.language import jit, tl  # noqa: F401 - the interpreter wants `tl` in sight of a kernel's callees


@jit
def accept(p, q, u):
    """Keep a draft token with probability min(1, p / q) (Leviathan et al., 2023, arXiv:2211.17192).

    Strict and without division: p = 0 is never accepted, q = 0 < p and p = q always are, NaN never is.
    """
    return u * q < p


@jit
def residual(p, q):
    """Unnormalised distribution of the token that replaces a rejected draft: (p - q) where it is positive, else 0."""
    return (p - q) * (q < p)


@jit
def within(mass, limit):
    """Whether the mass of the nearest neighbours may join the token (LANTERN, arXiv:2410.03355): prefix property."""
    return mass <= limit


NOTHING_LEFT = 1e-30  # a residual of this mass is rounding: p <= q in floating point


@jit
def near(p, p_draft, threshold):
    """Grouped acceptance (GSD, arXiv:2508.07747): a token joins the group when its probability is close enough."""
    return (p - p_draft < threshold) & (p_draft - p < threshold)
