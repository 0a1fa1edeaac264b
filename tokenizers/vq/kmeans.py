"""k-means for codebook initialisation: k-means++ seeding on a sample, then Lloyd iterations over distinct vectors.

Pixel-art patches repeat by the thousand, so duplicates are merged into weights first. The result is a function of the
vectors and the generator only.

Letters: n vectors, V centroids, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_ENTRIES = 1 << 22  # distances held at once: 16 MiB of float32, close to the cache
_SEEDS_PER_CENTROID = 16  # size of the seeding sample, in vectors for each centroid


def assign(vectors: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return nearest index ``[n]`` and squared distance ``[n]``."""
    norms = centroids.square().sum(-1)
    index = torch.empty(vectors.shape[0], dtype=torch.int64, device=vectors.device)
    distance = torch.empty(vectors.shape[0], dtype=vectors.dtype, device=vectors.device)
    chunk = max(1, _CHUNK_ENTRIES // centroids.shape[0])
    scaled = (-2 * centroids).T.contiguous()
    for start in range(0, vectors.shape[0], chunk):
        rows = vectors[start : start + chunk]
        best, where = torch.addmm(norms, rows, scaled).min(-1)
        index[start : start + chunk] = where
        distance[start : start + chunk] = best + rows.square().sum(-1)
    return index, distance.clamp_(min=0)


def _draw(weights: Tensor, generator: torch.Generator | None) -> int:
    # inverse of the cumulative weights: torch.multinomial is limited to 2^24 entries
    total = weights.double().cumsum(0)
    u = torch.rand((), dtype=torch.float64, generator=generator).to(total.device) * total[-1]
    return min(int(torch.searchsorted(total, u, right=True)), weights.shape[0] - 1)


def _seed(vectors: Tensor, weights: Tensor, num_centroids: int, generator: torch.Generator | None) -> Tensor:
    """k-means++: each next centroid with probability proportional to its weighted squared distance to the nearest."""
    size = _SEEDS_PER_CENTROID * num_centroids
    if vectors.shape[0] > size:
        keep = torch.randperm(vectors.shape[0], generator=generator)[:size].to(vectors.device)
        vectors, weights = vectors[keep], weights[keep]
    chosen = torch.empty(num_centroids, dtype=torch.int64)
    chosen[0] = _draw(weights, generator)
    distance = (vectors - vectors[chosen[0]]).square().sum(-1)
    for i in range(1, num_centroids):
        chosen[i] = _draw(distance * weights, generator)
        distance = torch.minimum(distance, (vectors - vectors[chosen[i]]).square().sum(-1))
    return vectors[chosen.to(vectors.device)].clone()


@torch.no_grad()
def kmeans(
    vectors: Tensor,
    num_centroids: int,
    *,
    l2_norm: bool = False,
    generator: torch.Generator | None = None,
    num_iterations: int = 12,
    start: Tensor | None = None,
) -> tuple[Tensor, float]:
    """Cluster vectors.

    Args:
        vectors: ``[n, C]`` float, finite.
        num_centroids: V. With at most V distinct vectors every one of them becomes a centroid and the rest repeat them.
        l2_norm: cluster directions: vectors and centroids have unit length.
        generator: CPU generator of the seeding; ``None`` uses torch's global one.
        num_iterations: Lloyd iterations; stops early when no assignment changes.
        start: ``[V, C]`` centroids to go on from instead of seeding: centroid i stays the i-th.

    Returns:
        Centroids ``[V, C]`` float32 and the mean squared distance of a vector to its centroid.

    Raises:
        ValueError: no vectors, or NaN among them.
    """
    if vectors.ndim != 2 or vectors.shape[0] == 0:
        raise ValueError(f"vectors must be [n, C] with n >= 1, got {tuple(vectors.shape)}")
    vectors = vectors.float()
    if not bool(vectors.isfinite().all()):
        raise ValueError("vectors must be finite, got NaN or infinity; check the encoder output")
    if l2_norm:
        vectors = F.normalize(vectors, dim=-1)
    vectors, counts = vectors.unique(dim=0, return_counts=True)
    weights = counts.float()
    if vectors.shape[0] <= num_centroids and start is None:
        return vectors[torch.arange(num_centroids, device=vectors.device) % vectors.shape[0]], 0.0
    centroids = _seed(vectors, weights, num_centroids, generator) if start is None else start.to(vectors)
    previous = None
    for _ in range(num_iterations):
        index, distance = assign(vectors, centroids)
        if previous is not None and bool((index == previous).all()):
            break
        previous = index
        centroids = update(vectors, weights, index, distance, num_centroids)
        if l2_norm:
            centroids = F.normalize(centroids, dim=-1)
    _, distance = assign(vectors, centroids)
    return centroids, float((distance * weights).sum() / weights.sum())


@torch.no_grad()
def refine(vectors: Tensor, centroids: Tensor) -> tuple[Tensor, float]:
    """Do one Lloyd iteration on centroids from elsewhere.

    Args:
        vectors: ``[n, C]`` float32.
        centroids: ``[V, C]`` float32.

    Returns:
        Moved centroids and the mean squared distance of a vector to its old one.
    """
    vectors, counts = vectors.unique(dim=0, return_counts=True)
    weights = counts.float()
    index, distance = assign(vectors, centroids)
    error = float((distance * weights).sum() / weights.sum())
    return update(vectors, weights, index, distance, len(centroids)), error


def update(vectors: Tensor, weights: Tensor, index: Tensor, distance: Tensor, num_centroids: int) -> Tensor:
    """Means of the vectors of each centroid ``[V, C]``; an empty centroid moves to the worst-served vector."""
    sums = vectors.new_zeros(num_centroids, vectors.shape[1]).index_add_(0, index, vectors * weights[:, None])
    mass = weights.new_zeros(num_centroids).index_add_(0, index, weights)
    centroids = sums / mass.clamp(min=1)[:, None]
    empty = (mass == 0).nonzero().flatten()
    if empty.numel():  # a centroid that lost all vectors moves to the worst-served one
        worst = (distance * weights).topk(min(empty.numel(), vectors.shape[0])).indices
        centroids[empty[: worst.numel()]] = vectors[worst]
    return centroids
