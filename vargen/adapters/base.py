"""What all adapters share: prompts in, windows of codes scored by the model's own body, nothing patched.

An adapter calls four modules of the model (text embedding, body, head, pixel decoder), each through its own ``forward``,
so that hooks of ``device_map``, quantised and LoRA layers and compiled modules keep working. A family says where these
modules are, how codes are embedded, which tokens stand between the codes, and what the unconditional branch reads.

Letters: B images, G guidance branches (conditional first), R = G * B rows, T longest prompt, S stream slots, W window,
D width, V codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from vargen.adapters.cache import RaggedCache, attention_mask
from vargen.adapters.prompts import PackedPrompts, PromptIds, pack, split_rows
from vargen.adapters.session import PromptSession
from vargen.backbones.cache import UNWRITTEN, KVCache, Plan
from vargen.protocols import Layout, StepOut

MASKED_IMPLEMENTATIONS = ("sdpa", "eager")  # take a 4-D mask; for a masked forward of another one sdpa stands in


class TransformersBackbone(nn.Module):
    """A transformers model as a backbone of the window decoder; families are subclasses, ``vargen.wrap`` picks one.

    Args:
        model: the model, on its devices, quantised or not; it is used, never changed.
        processor: the model's processor; only needed to read prompts given as text.
        grid_size: (h, w) codes, for models of free size.
        static: fixed shapes at every step, for a body that was compiled (``body.compile()``).
    """

    features = frozenset({"window", "ragged", "tree_mask", "any_slot", "hidden"})
    model_types: ClassVar[tuple[str, ...]] = ()
    model: Any  # a PreTrainedModel; transformers' modules are not typed
    config: Any
    processor: Any
    guidance_scale: float = 1.0  # the family's own settings, where its generation_config says nothing
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    default_grid: tuple[int, int]

    def __init__(
        self,
        model: nn.Module,
        processor: Any = None,
        *,
        grid_size: tuple[int, int] | None = None,
        static: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.processor, self.static = model, processor, static
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

    def _own_grid(self) -> tuple[int, int]:
        return self.default_grid

    def _check_grid(self, grid_size: tuple[int, int]) -> tuple[int, int]:
        h, w = (int(side) for side in grid_size)
        if h < 1 or w < 1:
            raise ValueError(f"grid_size must be (height, width) in codes, both at least 1, got {grid_size}")
        return h, w

    # --- what samplers and pipelines read -----------------------------------------------------------------------

    @property
    def num_codes(self) -> int:
        """N, codes of one image over all its grids."""
        return int((self.layout().forced < 0).sum())

    @property
    def codebook_size(self) -> int:
        """V."""
        ids = self._ids()
        assert ids is not None
        return len(ids)

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self.config.get_text_config(decoder=True).hidden_size)

    @property
    def device(self) -> torch.device:
        """Where codes are expected: the device on which tokens are embedded."""
        embedding = self.text_embedding
        hook = getattr(embedding, "_hf_hook", None)  # a dispatched model: weights may rest on "meta"
        where = getattr(hook, "execution_device", None)
        return embedding.weight.device if where is None else torch.empty(0, device=where).device

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
        """Guidance, temperature, top-k and top-p: from the model's generation_config, else as its authors sample."""
        stored = getattr(self.model, "generation_config", None)
        settings = {}
        for name in ("guidance_scale", "temperature", "top_k", "top_p"):
            value = getattr(stored, name, None)
            settings[name] = getattr(self, name) if value is None else value
        settings["top_k"] = min(int(settings["top_k"]), self.codebook_size)
        return settings

    def save_pretrained(self, save_directory: Any, **_: Any) -> None:
        """Refuse: the model saves itself."""
        raise ValueError("an adapter has no weights of its own; save the model with model.save_pretrained(folder)")

    @classmethod
    def from_pretrained(cls, folder: Any, **_: Any) -> Self:
        """Refuse: the model is loaded by transformers."""
        raise ValueError("load the model with transformers, then vargen.wrap(model, processor)")

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
        rows = prompts if _is_rows(prompts) else split_rows(prompts, self.text_embedding.weight.shape[0])
        self.check_prompts(rows, prompts)
        return rows

    def encode(self, texts: list[str]) -> PromptIds:
        """Tokenise prompts for ``prepare``, padded on the left."""
        rows = self.read(texts)
        longest = max(len(row) for row in rows)
        ids = torch.stack([nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
        mask = torch.stack([nn.functional.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])
        return PromptIds(ids, mask)

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
        if negative is None:
            return pack([rows, self.unconditional(rows)], self.device)
        others = self.read_negative(negative)
        if len(others) not in (1, len(rows)):
            raise ValueError(f"negative must hold 1 or {len(rows)} prompts, got {len(others)}")
        return pack([rows, others * (len(rows) // len(others))], self.device)

    def read_negative(self, negative: Any) -> list[Tensor]:
        """As ``read``, for the second branch, whose prompts may be of another form."""
        if isinstance(negative, str) or (isinstance(negative, Sequence) and isinstance(negative[0], str)):
            return self.read(negative)
        return split_rows(negative, self.text_embedding.weight.shape[0])

    # --- the window session -------------------------------------------------------------------------------------

    @torch.no_grad()
    def open(
        self,
        condition: PackedPrompts,
        *,
        max_window: int = 1,
        layout: Layout | None = None,
        hidden: bool = False,
        static: bool | None = None,
    ) -> tuple[PromptSession, StepOut]:
        """Run the prompts of all rows in one forward; logits [G, B, 1, V] predict slot 0.

        Args:
            condition: from ``prepare``.
            max_window: largest W of this session; a window may overshoot the end by W - 1 slots.
            layout: of another grid than ``grid_size``.
            hidden: return the hidden states of the last prompt tokens, [G, B, 1, D].
            static: as in the constructor, for this session.
        """
        if self.model.training:
            raise ValueError("the model is in training mode and its dropout would disturb decoding; call model.eval()")
        if max_window < 1:
            raise ValueError(f"max_window must be at least 1, got {max_window}")
        layout = self.layout() if layout is None else layout
        ids, lengths = condition.ids, condition.lengths
        rows, longest = ids.shape
        layers = int(self.config.get_text_config(decoder=True).num_hidden_layers)
        cache = KVCache(rows, longest + layout.length + max_window, layers, device=ids.device)
        index = torch.arange(longest, device=ids.device)
        if bool((lengths == longest).all()):
            plan = cache.plan_span(0, longest)
        else:
            tau = torch.where(condition.valid, index, UNWRITTEN)
            plan = cache.plan(index, tau=tau, nu=index, extent=longest)
        past = RaggedCache(cache)
        h = self._run(past, plan, self.text_embedding(ids), self.prompt_positions(index, lengths))
        last = h[torch.arange(rows, device=h.device), (lengths - 1).to(h.device)][:, None]  # R 1 D
        session = PromptSession(cache, condition.branches, lengths, layout, self.static if static is None else static)
        session.past = past
        return session, self._score(last, condition.branches, hidden)

    @torch.no_grad()
    def step(
        self,
        session: PromptSession,
        codes: Tensor,
        *,
        slots: Tensor | None = None,
        mask: Tensor | None = None,
        hidden: bool = False,
    ) -> StepOut:
        """Score a window: codes [B, W] int64 to logits [G, B, W, V]; see ``vargen.protocols.Backbone``."""
        width = codes.shape[1]
        if slots is None:
            slots = session.length[:, None] + torch.arange(width, device=codes.device)
        out = self._window(session, codes, slots, session.plan(width, mask), hidden)
        session.width = width
        return out

    @torch.no_grad()
    def step_at(self, session: PromptSession, codes: Tensor, slots: Tensor, *, hidden: bool = False) -> StepOut:
        """Score codes [B, w] at any stream slots [B, w] (-1 = no entry); they are permanent, ``commit`` plays no part.

        An entry sees the written slots before its own in raster order. A slot may be written again; within one call
        a row's slots differ.
        """
        return self._window(session, codes, slots, session.plan_at(slots), hidden)

    def commit(self, session: PromptSession, n: int | Tensor, path: Tensor | None = None) -> None:
        """Make the first n entries of the last window permanent, see ``WindowBackbone.commit``."""
        if isinstance(n, int) or n.device.type == "cpu":
            low, high = (n, n) if isinstance(n, int) else (int(n.min()), int(n.max()))
            if low < 0 or high > session.width:
                raise ValueError(f"n must be in 0..{session.width}, the last window's width, got {low}..{high}")
        if path is not None:
            session.cache.compact(path.repeat(session.branches, 1))
        session.advance(n)

    def select(self, session: PromptSession, rows: Tensor) -> None:
        """Keep the images ``rows`` [B'] int64, in this order."""
        session.select(rows)

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

    # --- inside -------------------------------------------------------------------------------------------------

    def _ids(self) -> Tensor | None:
        """``code_ids`` on the right device, looked up once."""
        if self._code_ids is None or self._code_ids.device != self.device:
            ids = self.code_ids()
            self._code_ids = None if ids is None else ids.to(self.device)
        return self._code_ids

    def _window(self, session: PromptSession, codes: Tensor, slots: Tensor, plan: Plan, hidden: bool) -> StepOut:
        slots = slots.clamp(0, session.layout.length - 1)  # entries past the end only keep windows of one width
        x = self._embed_slots(session, codes, slots).repeat(session.branches, 1, 1)
        positions = self.stream_positions(slots.repeat(session.branches, 1), session.starts, session.layout)
        return self._score(self._run(session.past, plan, x, positions), session.branches, hidden)

    def _embed_slots(self, session: PromptSession, codes: Tensor, slots: Tensor) -> Tensor:
        if not session.has_forced:
            return self.embed(codes)
        code_ids = self._ids()
        assert code_ids is not None
        forced = session.forced[slots]  # b w
        return self.text_embedding(torch.where(forced >= 0, forced, code_ids[codes]))

    def _run(self, past: RaggedCache, plan: Plan, embeddings: Tensor, positions: Tensor) -> Tensor:
        with past.planned(plan) as cache, self._implementation(plan) as implementation:
            return self.body(
                inputs_embeds=embeddings,
                attention_mask=attention_mask(plan, implementation, embeddings.dtype),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state

    @contextmanager
    def _implementation(self, plan: Plan) -> Iterator[str]:
        """The body's attention; where a mask is needed that it does not take (flash, flex), sdpa for this forward."""
        config = self.body.config
        chosen = config._attn_implementation
        if plan.mask is None or chosen in MASKED_IMPLEMENTATIONS:
            yield chosen
            return
        config._attn_implementation = "sdpa"
        try:
            yield "sdpa"
        finally:
            config._attn_implementation = chosen

    def _score(self, h: Tensor, branches: int, hidden: bool) -> StepOut:
        logits = self._code_logits(h).float().to(self.device)  # float32 from here on, whatever the head computes in
        return StepOut(logits.unflatten(0, (branches, -1)), h.unflatten(0, (branches, -1)) if hidden else None)

    def _code_logits(self, h: Tensor) -> Tensor:
        """Logits of the codes only: a slice of the head's rows where it is a plain linear layer, else of its output."""
        ids = self._ids()
        if ids is None:
            return self.head(h)
        head, first, count = self.head, int(ids[0]), len(ids)
        dense = bool((ids == torch.arange(first, first + count, device=ids.device)).all())
        plain = type(head) is nn.Linear and head.weight.device.type != "meta" and not hasattr(head, "_hf_hook")
        if dense and plain and not head._forward_hooks and not head._forward_pre_hooks:
            rows = slice(first, first + count)
            return nn.functional.linear(h.to(head.weight.device), head.weight[rows], _rows(head.bias, rows))
        logits = head(h)
        return logits[..., first : first + count] if dense else logits.index_select(-1, ids.to(logits.device))


def _is_rows(prompts: Any) -> bool:
    return isinstance(prompts, list) and all(isinstance(row, Tensor) and row.ndim == 1 for row in prompts)


def _rows(bias: Tensor | None, rows: slice) -> Tensor | None:
    return None if bias is None else bias[rows]


def name_ids(vocabulary: Mapping[str, int], names: Sequence[str]) -> list[int]:
    """Look token names up.

    Raises:
        ValueError: one is missing.
    """
    missing = [name for name in names if name not in vocabulary]
    if missing:
        raise ValueError(f"the model's vocabulary lacks the tokens {', '.join(missing)}; is this an image checkpoint?")
    return [int(vocabulary[name]) for name in names]
