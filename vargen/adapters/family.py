"""What a family of models says about itself, and what samplers and pipelines read of every adapter.

An adapter touches four modules of the model (text embedding, body, head, pixel decoder). A family says where they are,
how codes are embedded, which tokens stand between the codes, and what the unconditional branch reads.

Letters: B images, R rows, S stream slots, W window, D width, V codes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from vargen.adapters.prompts import PackedPrompts, PromptIds, pack, split_rows
from vargen.hooks import execution_device, hooked, runs_as_forward
from vargen.protocols import Layout
from vargen.validation.checks import read_grid

logger = logging.getLogger(__name__)


class FamilyAdapter(nn.Module):
    """A transformers model, its prompts and its settings; ``TransformersBackbone`` adds the window session.

    Args:
        model: the model, on its devices, quantised or not; it is used, never changed.
        processor: the model's processor; only needed to read prompts given as text.
        grid_size: (h, w) codes, for models of free size.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    model: Any  # a PreTrainedModel; transformers' modules are not typed
    config: Any
    processor: Any
    guidance_scale: float = 1.0  # the family's own settings, where its generation_config says nothing
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    default_grid: tuple[int, int]
    wraps_transformers = True  # it has no weights of its own

    def __init__(self, model: nn.Module, processor: Any = None, *, grid_size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.model, self.processor = model, processor
        self.config = model.config
        self.grid_size = self._check_grid(grid_size or self._own_grid())
        self._code_ids: Tensor | None = None

    # --- what a family says -------------------------------------------------------------------------------------

    @property
    def body(self) -> Any:
        """The language model without its head."""
        raise NotImplementedError

    @property
    def head(self) -> Any:
        """Hidden states to logits; over the whole vocabulary where ``code_ids`` exist."""
        raise NotImplementedError

    def code_ids(self) -> Tensor | None:
        """[V] int64 token id of every code; None where codes have an embedding and a head of their own."""
        return None

    def layout(self, height: int | None = None, width: int | None = None) -> Layout:
        """The stream of one image; height and width, in codes, default to ``grid_size``."""
        raise NotImplementedError

    def unconditional(self, rows: list[Tensor]) -> list[Tensor]:
        """The unconditional prompt of every conditional one, token ids each."""
        raise NotImplementedError

    def encode_text(self, texts: list[str]) -> Any:
        """Tokenise prompts given as text: ``input_ids`` and ``attention_mask``, or a row of ids for each."""
        raise NotImplementedError

    def check_prompts(self, rows: list[Tensor], given: Any) -> None:
        """Raise ``ValueError`` for prompts that cannot begin an image of this model."""

    def pixels(self) -> nn.Module | None:
        """What decodes codes to pixels, if the model has it."""
        return None

    def to_stream(self, codes: Tensor) -> Tensor:
        """Codes [B, N] in the form in which the model's own ``generate`` returns them."""
        return codes

    @runs_as_forward
    def embed(self, codes: Tensor) -> Tensor:
        """Input embeddings of codes: [...] int64 to [..., D]."""
        ids = self._ids()
        assert ids is not None
        return self.text_embedding(ids[codes])

    def prompt_positions(self, index: Tensor, lengths: Tensor) -> Tensor:
        """Rotary positions of the prompt slots ``index [T]`` for prompts of ``lengths [R]``: [R, T], or [3, R, T]."""
        return index.expand(len(lengths), -1)

    def stream_positions(self, slots: Tensor, lengths: Tensor, layout: Layout) -> Tensor:
        """Rotary positions of stream slots [R, W] behind prompts of ``lengths [R]``: [R, W], or [3, R, W]."""
        return lengths[:, None] + slots

    def _own_grid(self) -> tuple[int, int]:
        return self.default_grid

    def _check_grid(self, grid_size: Any) -> tuple[int, int]:
        h, w = read_grid("grid_size", grid_size)
        return h, w

    # --- what samplers and pipelines read -----------------------------------------------------------------------

    @property
    def num_codes(self) -> int:
        """N, codes of one image over all its grids."""
        return int((self.layout().forced < 0).sum())

    @property
    def codebook_size(self) -> int:
        """Codes of the codebook, V."""
        ids = self._ids()
        assert ids is not None
        return len(ids)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states, D."""
        return int(self.config.get_text_config(decoder=True).hidden_size)

    @property
    def device(self) -> torch.device:
        """Where codes are expected: the device on which tokens are embedded."""
        # hooks around the adapter bring all of the model; a dispatched model has them around its parts
        return execution_device(self if hooked(self) else self.text_embedding)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of embedded tokens."""
        return self.text_embedding.weight.dtype

    @property
    def text_embedding(self) -> Any:
        """Token ids to vectors."""
        return self.model.get_input_embeddings()

    @property
    def training(self) -> bool:  # type: ignore[override]
        """Whether the model is in training mode; an adapter has no mode of its own."""
        return self.model.training

    @training.setter
    def training(self, mode: bool) -> None:
        """Nothing to set: ``train`` and ``eval`` reach the model as a child."""

    def to(self, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """Move the model; transformers' own guards (quantised, dispatched) apply."""
        self.model.to(*args, **kwargs)
        return self

    def with_grid(self, height: int, width: int) -> Self:
        """The same model for images of height x width codes."""
        other = copy(self)
        other.grid_size = self._check_grid((height, width))
        return other

    def sampler_settings(self) -> dict[str, Any]:
        """Guidance, temperature, top-k and top-p: from the model's generation_config, else as its authors sample.

        The values are logged (level info), because ``generate`` would fill gaps in another way (top-k 50).
        """
        stored = getattr(self.model, "generation_config", None)
        settings = {}
        for name in ("guidance_scale", "temperature", "top_k", "top_p"):
            value = getattr(stored, name, None)
            settings[name] = getattr(self, name) if value is None else value
        settings["top_k"] = min(int(settings["top_k"]), self.codebook_size)
        logger.info("sampling %s with %s", type(self.model).__name__, settings)
        return settings

    def save_pretrained(self, save_directory: Any, **_: Any) -> None:
        """Refuse: the model saves itself."""
        raise ValueError("an adapter has no weights of its own; save the model with model.save_pretrained(folder)")

    def push_to_hub(self, *_: Any, **__: Any) -> None:
        """Refuse: the model uploads itself."""
        raise ValueError("an adapter has no weights of its own; upload the model with model.push_to_hub(id)")

    @classmethod
    def from_pretrained(cls, folder: Any, **_: Any) -> Self:
        """Refuse: the model is loaded by transformers."""
        raise ValueError("load the model with transformers, then vargen.wrap(model, processor)")

    def _ids(self) -> Tensor | None:
        """``code_ids`` on the right device, looked up once."""
        if self._code_ids is None or self._code_ids.device != self.device:
            ids = self.code_ids()
            self._code_ids = None if ids is None else ids.to(self.device)
        return self._code_ids

    # --- prompts ------------------------------------------------------------------------------------------------

    def read(self, prompts: Any) -> list[Tensor]:
        """Turn texts, processor outputs or token ids into one row of ids a prompt.

        Raises:
            ValueError: see ``vargen.adapters.prompts.split_rows``; text without a processor; a prompt that cannot begin
                an image.
        """
        texts = [prompts] if isinstance(prompts, str) else prompts
        if isinstance(texts, Sequence) and len(texts) and all(isinstance(text, str) for text in texts):
            if self.processor is None:
                raise ValueError(
                    f"{type(self).__name__} has no processor and so reads no text; "
                    "use vargen.wrap(model, processor) or give the processor's outputs"
                )
            prompts = self.encode_text(list(texts))
        rows = prompts if _is_rows(prompts) else self.token_rows(prompts)
        self.check_prompts(rows, prompts)
        return rows

    def token_rows(self, prompts: Any) -> list[Tensor]:
        """The valid token ids of every prompt in a processor's outputs."""
        return split_rows(prompts, self.text_embedding.weight.shape[0])

    def encode(self, texts: list[str]) -> PromptIds:
        """Tokenise prompts for ``prepare``, padded on the left."""
        rows = self.read(texts)
        longest = max(len(row) for row in rows)
        ids = torch.stack([nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
        mask = torch.stack([nn.functional.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])
        return PromptIds(ids, mask)

    @runs_as_forward
    @torch.no_grad()
    def prepare(self, condition: Any, *, guidance_scale: float | Tensor = 1.0, negative: Any = None) -> PackedPrompts:
        """Check a batch of prompts and add the unconditional branch.

        Args:
            condition: texts (needs the processor), the processor's outputs, ``(input_ids, attention_mask)`` or ids.
            guidance_scale: 1 = one branch; anything else adds the second.
            negative: prompts of the second branch, one or as many as images; default the family's own.

        Raises:
            ValueError: unusable prompts, or a negative prompt without guidance.
        """
        rows = self.read(condition)
        guided = bool((torch.as_tensor(guidance_scale) != 1).any())
        if negative is not None and not guided:
            raise ValueError("a negative prompt has no effect without guidance; set guidance_scale above 1")
        if not guided:
            return pack([rows], self.device)
        others = self.unconditional(rows) if negative is None else self.read_negative(negative)
        if len(others) not in (1, len(rows)):
            raise ValueError(f"negative must hold 1 or {len(rows)} prompts, got {len(others)}")
        return self.pack_guided(rows, others * (len(rows) // len(others)), guidance_scale)

    def pack_guided(self, rows: list[Tensor], others: list[Tensor], guidance_scale: float | Tensor) -> PackedPrompts:
        """Rows of all branches; a family may put further ones between the conditional and the unconditional."""
        return pack([rows, others], self.device)

    def read_negative(self, negative: Any) -> list[Tensor]:
        """As ``read``, for the second branch, whose prompts may be of another form."""
        if isinstance(negative, str) or (isinstance(negative, Sequence) and isinstance(negative[0], str)):
            return self.read(negative)
        return split_rows(negative, self.text_embedding.weight.shape[0])


def _is_rows(prompts: Any) -> bool:
    return isinstance(prompts, list) and all(isinstance(row, Tensor) and row.ndim == 1 for row in prompts)


def name_ids(vocabulary: Mapping[str, int], names: Sequence[str]) -> list[int]:
    """Look token names up.

    Raises:
        ValueError: one is missing.
    """
    missing = [name for name in names if name not in vocabulary]
    if missing:
        raise ValueError(f"the model's vocabulary lacks the tokens {', '.join(missing)}; is this an image checkpoint?")
    return [int(vocabulary[name]) for name in names]
