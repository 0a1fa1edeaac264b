"""The slots that a window decoder walks: codes in raster order, with structural slots between them where a model has some.

Letters: B images, N code positions, S slots that need a decision, V codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vargen.protocols import Backbone


@dataclass
class SlotLayout:
    """The slots of one image, up to the one of the last code."""

    num_slots: int  # S
    code_slots: Tensor | None  # [N] slots that hold codes; None when all of them do
    code_index: Tensor  # [S] number of the code in each slot (a structural slot has its predecessor's): keys the noise
    stride: int  # slots between a code and the one below it

    @classmethod
    def of(cls, backbone: Backbone) -> tuple[SlotLayout, Tensor | None]:
        """Read the backbone's layout; also return its structural slots ``[S]`` (0 there, -1 elsewhere) or None."""
        given = backbone.layout()
        is_code = given.forced < 0
        num_slots = int(is_code.nonzero()[-1]) + 1
        is_code, grid, column = is_code[:num_slots], given.slot_grid[:num_slots, 0], given.slot_grid[:num_slots, 2]
        starts = ((grid == grid[-1]) & (column == 0)).nonzero().flatten()
        stride = int(starts[1] - starts[0]) if len(starts) > 1 else num_slots
        all_codes = bool(is_code.all())
        table = cls(
            num_slots=num_slots,
            code_slots=None if all_codes else is_code.nonzero().flatten(),
            code_index=(is_code.long().cumsum(0) - 1).clamp(min=0),
            stride=stride,
        )
        return table, None if all_codes else torch.where(is_code, -1, 0)

    def to(self, device: torch.device) -> SlotLayout:
        """Return the tables on the device of the decode."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return SlotLayout(**(vars(self) | moved))

    def only_codes(self, slots: Tensor) -> Tensor:
        """``[B, N]`` of ``[B, S or more]``: drop what is no code."""
        return slots[:, : self.num_slots] if self.code_slots is None else slots[:, self.code_slots]


def forced_slots(
    codes: Tensor | None, structural: Tensor | None, layout: SlotLayout, num_images: int, codebook_size: int
) -> Tensor | None:
    """Merge codes fixed by the user, ``[N]`` or ``[B, N]`` with -1 where free, and structural slots into ``[B, S]``.

    Raises:
        ValueError: wrong shape or type, or a code outside -1..V-1.
    """
    if codes is None:
        return None if structural is None else structural.expand(num_images, -1).clone()
    num_codes = layout.num_slots if layout.code_slots is None else len(layout.code_slots)
    codes = torch.as_tensor(codes)
    if codes.dtype.is_floating_point or codes.dtype == torch.bool:
        raise ValueError(f"forced_codes must be integers, -1 where free, got {codes.dtype}")
    if codes.shape not in ((num_codes,), (num_images, num_codes)):
        raise ValueError(
            f"forced_codes must be [{num_codes}] or [{num_images}, {num_codes}] (positions in raster order), "
            f"got {list(codes.shape)}"
        )
    if bool(((codes < -1) | (codes >= codebook_size)).any()):
        raise ValueError(
            f"forced_codes must be in 0..{codebook_size - 1}, or -1 where free, got {codes.min()}..{codes.max()}"
        )
    codes = codes.to(torch.int64).expand(num_images, -1)
    if layout.code_slots is None:
        return codes.clone()
    forced = structural.to(codes.device).expand(num_images, -1).clone()  # type: ignore[union-attr]
    forced[:, layout.code_slots.to(codes.device)] = codes
    return forced
