"""What training asks of a data set, and the data sets by name.

A data set of your own is one file with one class, and one line in ``DATASETS``; a recipe then names it as ``data.name``.

Letters: B examples, S attribute slots, T frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:  # the atlas and its prompts work without torch
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

Split = Literal["train", "test"]

DATASETS: dict[str, tuple[str, str]] = {  # name -> (module, class); imported when asked for
    "heroes": ("vargen.datasets.heroes.dataset", "HeroesDataset"),
    "motion": ("vargen.datasets.motion.dataset", "MotionDataset"),
}


class Dataset(Protocol):
    """Examples by index: example i is a function of the arguments and i alone, so that a resumed run sees the same.

    Opened as ``Kind(seed, split=..., attribute_dropout=..., null_dropout=..., **options)``: the options are the recipe's
    ``[data.options]``. The splits share no example. Crops, flips and resizing are the data set's own. Attributes are
    dropped here, with the two rates; class labels are dropped by the backbone, which owns the null label.

    The defaults below are those of class labels.
    """

    kind: ClassVar[Literal["image", "clip"]]  # the entry of an example that holds its pixels
    condition_type: ClassVar[Literal["class", "attributes"]]  # the entry that holds its condition
    image_size: tuple[int, int]  # height and width in pixels
    words: str | Sequence[str]  # what reads prompts: a vocabulary of AttributeConditioner, or the names of the classes

    def examples(self, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """Make the examples with these indices.

        Args:
            indices: [B] integers >= 0, without an end: a finite set starts again.

        Returns:
            The entry ``kind``, float32 in [-1, 1]: images [B, 3, H, W] or clips [B, 3, T, H, W]; the entry
            ``condition_type``, int64: labels [B] or attribute ids [B, S], 0 where dropped; more where a metric needs it.
        """
        ...

    def condition_settings(self) -> dict[str, Any]:
        """Settings of a backbone that the conditions decide, as its constructor names them."""
        return {"condition_type": "class", "num_classes": len(self.words)}

    def captions(self, conditions: Tensor) -> list[str]:
        """One text a condition, written beside the sample grids."""
        return [self.words[label] for label in conditions.tolist()]

    def variants(self, conditions: Tensor) -> dict[str, Tensor]:
        """More conditions to score the same test examples under, by the suffix of their metric."""
        return {}

    def foreground(self, images: Tensor) -> Tensor | None:
        """Pixels [B, 1, H, W] bool that a reconstruction is measured on apart; None where everything counts the same."""
        return None
