"""The shared-noise rule in a tree: draw the token behind a node, go to the child that holds it, and so on.

Exact for any proposals, and the codes are those of next-token sampling with the same seed.

Letters: A images, C children of a node.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vargen.kernels.draw import draw
from vargen.kernels.tree.types import AcceptedPath
from vargen.samplers.acceptance.base import Noise, Rows
from vargen.samplers.acceptance.tree import TreeRule
from vargen.samplers.drafters.tree import TreeDraft


@dataclass(frozen=True)
class SharedNoiseTree(TreeRule):
    """The rule over trees."""

    def find_path(self, rows: Rows, draft: TreeDraft, noise: Noise) -> AcceptedPath:
        """Draw the token behind a node, go to the child that holds it, and so on; one draw a level."""
        image = torch.arange(len(draft.tokens), device=draft.tokens.device)
        node, count = torch.zeros_like(image), torch.zeros_like(image)
        alive, path, tokens = rows.num_rows > 0, [], []
        children = draft.tree.children.expand(len(image), -1, -1)
        for level in range(draft.tree.max_depth + 1):
            path.append(node)
            tokens.append(self._draw(rows, noise, image, node, level))
            kids = children[image, node]  # A C
            held = draft.tokens[image[:, None], kids.clamp(min=0)].where(kids >= 0, -1)
            equal = held == tokens[-1][:, None]
            alive = alive & equal.any(-1) & (level + 1 < rows.num_rows)
            count = count + alive
            child = kids.gather(1, equal.long().argmax(-1, keepdim=True))[:, 0]
            node = child.where(alive, node)
        column = torch.arange(len(path), device=image.device)
        found = torch.stack(path, 1).where(column <= count[:, None], 0)
        none = torch.zeros_like(count)
        return AcceptedPath(found, torch.stack(tokens, 1), count, rows.logits.new_zeros(len(image), 0), none, none)

    def choose_behind(self, found: AcceptedPath, rows: Rows, noise: Noise) -> Tensor:
        """The token behind the path is drawn already."""
        return found.tokens

    def _draw(self, rows: Rows, noise: Noise, image: Tensor, node: Tensor, level: int) -> Tensor:
        logits, positions = rows.logits[:, image, node][:, :, None], rows.positions[:, level, None]
        fixed = None if rows.forced is None else rows.forced[:, level, None]  # A 1
        if fixed is not None:  # a fixed slot may have no distribution
            logits = torch.where((fixed >= 0)[..., None], 0.0, logits)
        shared = None if noise.cache is None else noise.cache.rows(positions)
        token = draw(logits, seeds=noise.keys, positions=positions, noise=shared, errors=noise.errors, **rows.warp)
        return (token if fixed is None else torch.where(fixed >= 0, fixed, token))[:, 0]
