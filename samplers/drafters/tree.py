"""Trees of proposals: their shapes, the masks and paths that verification needs, and the tokens put on them.

Node 0 is the last permanent code, which is fed but not proposed; every other node proposes a code for the slot behind its
parent's. Parents come before children and depths never fall, so that the first nodes of a tree form a tree.

Letters: B images, n nodes, D depth of the deepest node, C most children of a node, R draft rows, V codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vargen.kernels.tree.types import TreeProposals

# Paths of child numbers, one word a node, as published: `naive_extend_57` and the others with LANTERN (arXiv:2410.03355,
# arXiv:2502.06352), `mc_sim_7b_63` with EAGLE (arXiv:2401.15077), `medusa_2_7b_63` with Medusa (arXiv:2401.10774).
NAMED_TREES = {
    "naive_extend_57": """
        0 1 2 3 4 00 01 02 03 10 11 12 20 21 22 30 31 40 000 001 002 003 010 011 012 020 021 022 030 031 100 101 110 200
        0000 0001 0002 0003 0010 0011 0012 0020 0021 0030 0100 0101 0110 0200 00000 00001 00002 00010 00011 00100 00101
        00110 00200""",
    "mc_sim_7b_63": "0 1 2 3 00 01 02 10 11 20 21 30 000 001 002 010 011 020 021 100 0000 0001 0002 00000 00001",
    "mc_sim_7b_63_balanced": """
        0 1 2 00 01 02 10 11 12 20 21 000 001 002 010 011 100 101 110 111 0000 0001 0002 00000 00001""",
    "reverse_balanced_25": """
        0 1 2 00 01 10 20 000 001 002 010 011 100 0000 0001 0002 0010 0011 00000 00001 00002 00003 00010 00011 00012""",
    "medusa_2_7b_63": """
        0 1 2 3 4 5 6 7 8 9 00 01 02 03 04 05 06 07 08 09 10 11 12 13 14 20 21 30 31 40 50 60 70 000 001 002
        003 004 005 006 007 008 010 011 012 013 020 021 030 040 050 100 101 102 110 200 0000 0001 0002 0003
        0010 0020 0100""",
}


@dataclass(frozen=True)
class Tree:
    """The shape of a tree for every image; B = 1 where all images share one."""

    parents: Tensor  # [B, n] int64, -1 for node 0
    depth: Tensor  # [B, n] int64, 0 for node 0
    mask: Tensor  # [B, n, n] bool, True where node i may see node j: itself and its ancestors
    children: Tensor  # [B, n, C] int64 in the order in which they are tested, -1 behind the last
    order: Tensor  # [B, n] int64; of equally deep nodes the one with the least is on the earliest root-to-leaf path
    max_depth: int  # D, or a bound on it

    @property
    def num_nodes(self) -> int:
        """n."""
        return self.parents.shape[1]

    @classmethod
    def from_parents(cls, parents: Tensor, max_depth: int, max_children: int, leaf_order: bool = False) -> Tree:
        """Build a tree from its parents, without reading a value back from the device.

        Args:
            parents: ``[B, n]`` int64.
            max_depth: D, or a bound on it.
            max_children: C or more; further children of a node are never tested.
            leaf_order: paths are ordered by the number of their leaf, not by the numbers of their nodes from the root on.
        """
        batch, n = parents.shape
        device = parents.device
        above = parents.clamp(min=0)
        own = torch.eye(n, dtype=torch.bool, device=device).expand(batch, -1, -1)
        mask, index = own, torch.arange(n, device=device)
        order = torch.zeros_like(parents)
        for _ in range(max_depth):  # one more ancestor a round
            mask = own | (mask.gather(1, above[..., None].expand(-1, -1, n)) & (parents >= 0)[..., None])
        depth = mask.sum(-1) - 1
        if leaf_order:
            is_leaf = ~(parents[:, None, :] == index[:, None]).any(-1)  # b n
            order = torch.where(mask & is_leaf[..., None], index[:, None], n).amin(1)
        else:
            for level in range(1, max_depth + 1):  # the numbers of the ancestors from the root on, as digits
                digit = torch.where(mask & (depth == level)[:, None], index, 0).amax(-1)  # b n
                order = order * n + digit
        siblings = (parents[:, :, None] == parents[:, None, :]).tril(-1)
        rank = siblings.sum(-1).clamp(max=max_children)  # b n
        place = torch.where(parents >= 0, above * (max_children + 1) + rank, max_children)
        children = torch.full((batch, n * (max_children + 1)), -1, device=device)
        children.scatter_(1, place, index.expand(batch, -1))
        return cls(parents, depth, mask, children.view(batch, n, -1)[..., :max_children], order, max_depth)

    @classmethod
    def from_paths(cls, paths: Sequence[Sequence[int]]) -> Tree:
        """Build a shared tree from paths of child numbers; every prefix of a path must be a path.

        Raises:
            ValueError: an empty or repeated path, or one whose prefix is missing.
        """
        ordered = sorted((tuple(path) for path in paths), key=lambda path: (len(path), path))
        number: dict[tuple[int, ...], int] = {(): 0}
        parents = [-1]
        for path in ordered:
            if path[:-1] not in number or path in number:
                raise ValueError(f"a tree needs every prefix of a path, once, got {path}")
            number[path] = len(parents)
            parents.append(number[path[:-1]])
        num_children = max(parents.count(i) for i in range(len(parents)))
        return cls.from_parents(torch.tensor([parents]), max(map(len, ordered)), num_children)

    @classmethod
    def named(cls, name: str) -> Tree:
        """Build one of ``NAMED_TREES``."""
        return cls.from_paths([[int(digit) for digit in word] for word in NAMED_TREES[name].split()])

    @classmethod
    def chain(cls, length: int) -> Tree:
        """One proposal for each of ``length`` slots."""
        return cls.from_paths([[0] * n for n in range(1, length + 1)])

    def rows(self) -> Tensor:
        """Root-to-leaf paths of a shared tree, ``[leaves, D + 1]`` int64, -1 behind the leaf, in their order."""
        parents = self.parents[0].tolist()
        leaves = [i for i in range(len(parents)) if i not in parents]
        leaves.sort(key=lambda i: (int(self.order[0, i]), i))
        paths = [self.mask[0, leaf].nonzero().flatten().tolist() for leaf in leaves]
        longest = max(map(len, paths))
        return torch.tensor([path + [-1] * (longest - len(path)) for path in paths])

    def inner(self) -> list[list[int]]:
        """Nodes of a shared tree that have children, level by level: what a drafter has to read."""
        has = (self.children[0] >= 0).any(-1).tolist()
        depth = self.depth[0].tolist()
        return [[i for i in range(len(has)) if has[i] and depth[i] == level] for level in range(max(depth))]

    def narrow(self, width: int) -> Tree:
        """The tree of the first ``width`` nodes; reads its depth."""
        children, depth = self.children[:, :width], self.depth[:, :width]
        return Tree(
            self.parents[:, :width],
            depth,
            self.mask[:, :width, :width],
            children.where(children < width, -1),
            self.order[:, :width],
            int(depth.max()),
        )

    def select(self, rows: Tensor) -> Tree:
        """Keep the images ``rows``."""
        return self if len(self.parents) == 1 else self._map(lambda value: value[rows])

    def to(self, device: torch.device) -> Tree:
        """Move to a device."""
        return self._map(lambda value: value.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Tree:
        names = ("parents", "depth", "mask", "children", "order")
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in names}
        return replace(self, **changed)


@dataclass(frozen=True)
class TreeDraft:
    """Proposals on a tree, see ``TreeProposals`` for the fields."""

    tree: Tree
    tokens: Tensor  # [B, n] int64, -1 where there is no proposal; entry 0 is not read
    distributions: Tensor | None = None
    row_of: Tensor | None = None
    replacement: bool = False
    probs: Tensor | None = None

    @property
    def proposals(self) -> TreeProposals:
        """What verification reads."""
        drawn = (self.distributions, self.row_of, self.replacement, self.probs)
        return TreeProposals(self.tokens, self.tree.children, self.tree.max_depth, *drawn)

    def narrow(self, width: int) -> TreeDraft:
        """The first ``width`` nodes."""
        if width == self.tree.num_nodes:
            return self
        row_of = None if self.row_of is None else self.row_of[:width]
        probs = None if self.probs is None else self.probs[:, :width]
        return replace(self, tree=self.tree.narrow(width), tokens=self.tokens[:, :width], row_of=row_of, probs=probs)

    def select(self, rows: Tensor) -> TreeDraft:
        """Keep the images ``rows``."""
        q, probs = (None if value is None else value[rows] for value in (self.distributions, self.probs))
        return replace(self, tree=self.tree.select(rows), tokens=self.tokens[rows], distributions=q, probs=probs)
