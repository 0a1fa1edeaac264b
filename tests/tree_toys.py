"""Toy backbones that score trees: the token cache of ``tests.toys`` under slots, masks and paths."""

import torch

from tests.toys import SpatialBackbone, TabularBackbone
from vargen.protocols import StepOut


class TreeMasks:
    """Mixin: every entry of a window sees the cache and its own ancestors, each at its slot."""

    features = frozenset({"window", "ragged", "tree_mask"})

    def step(self, session, codes, *, slots=None, mask=None, hidden=False):
        if mask is None:
            session.window = None
            return super().step(session, codes, hidden=hidden)
        batch, width = codes.shape
        mask = mask.expand(batch, -1, -1)
        assert batch == len(session.length)
        assert bool(mask.diagonal(dim1=1, dim2=2).all()), "an entry does not see itself"
        rows = []
        for i in range(width):
            cache = session.cache.clone()
            cache.scatter_(1, session.length[:, None] + torch.arange(width), -1)  # nothing but ancestors may be read
            for j in range(width):
                place = slots[:, j, None].clamp(max=session.capacity - 1)
                old = cache.gather(1, place)
                cache.scatter_(1, place, codes[:, j, None].where(mask[:, i, j, None], old))
            view = type(session)(session.labels, session.branches, cache, session.length)
            rows.append(self._score(view, slots[:, i, None] + 1))
        session.window, session.fed = codes, width
        self.num_forwards += 1
        self.num_rows += batch * width
        return StepOut(torch.cat(rows, dim=2))

    def commit(self, session, n, path=None):
        n = torch.as_tensor(n).expand(len(session.length))
        if path is None or session.window is None:
            super().commit(session, n)
            return
        taken = session.window.gather(1, path)
        for i in range(path.shape[1]):
            here = i < n
            place = (session.length + i).clamp(max=session.capacity - 1)[:, None]
            session.cache.scatter_(
                1, place, torch.where(here[:, None], taken[:, i, None], session.cache.gather(1, place))
            )
        super().commit(session, n)


class TreeTabular(TreeMasks, TabularBackbone):
    """An independent random law for every class, branch and prefix."""


class TreeSpatial(TreeMasks, SpatialBackbone):
    """The flat spatial model, and blurred copies of it that draft for it."""

    def __init__(self, *args, blur=0.0, **kwargs):
        super().__init__(*args, **kwargs)
        generator = torch.Generator().manual_seed(99)
        noise = torch.randn(self.embedding.shape, generator=generator)
        self.embedding = (1 - blur**2) ** 0.5 * self.embedding + blur * noise
