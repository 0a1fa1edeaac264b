"""The old name of speculative sampling with a chain of drafts; its old settings are in samplers/registry.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vargen.protocols import Backbone
from vargen.samplers.drafters.base import check_drafter
from vargen.samplers.window.speculative import SpeculativeSampler


@dataclass(frozen=True, kw_only=True)
class DraftModelSampler(SpeculativeSampler):
    """``SpeculativeSampler`` for a draft model given as ``drafter=`` (``pipe.drafter``)."""

    preferred_drafter: ClassVar[str | None] = None

    def check_proposer(self, backbone: Backbone, drafter: Any) -> None:
        """Raise ``ValueError`` unless ``drafter`` is a backbone over the same codes."""
        check_drafter(type(self).__name__, backbone, drafter)

    def reads_hidden(self, drafter: Any) -> bool:
        """Draft models stand on codes."""
        return False
