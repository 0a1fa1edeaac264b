"""Kinds of arguments of a pipeline call, as people give them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from vargen.samplers.drafters.base import PlainDrafter

PromptInput = str | Sequence[str] | np.ndarray | None
LabelInput = int | str | Sequence[int | str] | np.ndarray | Tensor | None
ImageInput = Image.Image | Sequence[Image.Image] | np.ndarray | Tensor | None
SeedInput = int | Sequence[int] | np.ndarray | Tensor | None
DrafterInput = str | nn.Module | PlainDrafter | None  # the name of a drafter, or one itself
Pictures = list[Any] | Tensor | np.ndarray  # by output_type: PIL images, "pt" or "np"
Rows = Tensor | tuple[Any, ...]  # a tensor, or a tuple of tensors and None, with a row an image
