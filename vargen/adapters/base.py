"""The window session of every adapter: codes scored by the model's own body, nothing patched.

Text embedding, body and head are called through their own ``forward``, so that hooks of ``device_map``, quantised and
LoRA layers and compiled modules keep working.

Letters: B images, G guidance branches (conditional first), R = G * B rows, U different rows, T longest prompt, W window,
D width, V codes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from vargen.adapters.cache import MASKED_IMPLEMENTATIONS, RaggedCache, attention_mask
from vargen.adapters.family import FamilyAdapter
from vargen.adapters.prompts import PackedPrompts
from vargen.adapters.session import PromptSession
from vargen.backbones.layers.cache.kv_cache import UNWRITTEN, KVCache, Plan
from vargen.features import Feature
from vargen.hooks import hooked, runs_as_forward
from vargen.protocols import Layout, StepOut


class TransformersBackbone(FamilyAdapter):
    """A transformers model as a backbone of the window decoder; families are subclasses, ``vargen.wrap`` picks one.

    Args:
        model: the model, on its devices, quantised or not; it is used, never changed.
        processor: the model's processor; only needed to read prompts given as text.
        grid_size: (h, w) codes, for models of free size.
        static: fixed shapes at every step, for a body that was compiled (``body.compile()``).
        compile: compile the forward of a window (not the prompt's), as ``torch.compile(body, dynamic=False)`` with
            further arguments if a mapping is given; sets ``static``. Left out for models that are offloaded or whose
            quantisation cannot be compiled.
    """

    features = frozenset({Feature.WINDOW, Feature.RAGGED, Feature.TREE_MASK, Feature.ANY_SLOT, Feature.HIDDEN})

    def __init__(
        self,
        model: nn.Module,
        processor: Any = None,
        *,
        grid_size: tuple[int, int] | None = None,
        static: bool = False,
        compile: bool | Mapping[str, Any] = False,
    ) -> None:
        super().__init__(model, processor, grid_size=grid_size)
        self._compiled = compile_body(self, compile) if compile is not False else None
        self.static = static or self._compiled is not None

    @runs_as_forward
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
        """Run the prompts of all rows in one forward, equal ones once; logits [G, B, 1, V] predict slot 0.

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
        last, past = self._prefill(condition, layout.length + max_window)
        static = self.static if static is None else static
        session = PromptSession(past, condition, layout, static)
        return session, self._score(session, last, hidden)

    def _prefill(self, condition: PackedPrompts, room: int) -> tuple[Tensor, RaggedCache]:
        """Run the different prompts; hidden states [R, 1, D] of their ends, and the cache of all rows."""
        ids, lengths = condition.ids[condition.distinct], condition.lengths[condition.distinct]
        rows, longest = ids.shape
        layers = int(self.config.get_text_config(decoder=True).num_hidden_layers)
        cache = KVCache(rows, longest + room, layers, device=ids.device)
        index = torch.arange(longest, device=ids.device)
        if bool((lengths == longest).all()):
            plan = cache.plan_span(0, longest)
        else:
            valid = condition.valid[condition.distinct]
            plan = cache.plan(index, tau=torch.where(valid, index, UNWRITTEN), nu=index, extent=longest)
        past = RaggedCache(cache)
        h = self._run(self.body, past, plan, self.text_embedding(ids), self.prompt_positions(index, lengths))
        last = h[torch.arange(rows, device=h.device), (lengths - 1).to(h.device)][:, None]  # u 1 d
        if rows < len(condition.ids):
            cache.select(condition.source)
            last = last[condition.source.to(last.device)]
        return last, past

    @runs_as_forward
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

    @runs_as_forward
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

    def rewind(self, session: PromptSession, n: int | Tensor) -> None:
        """Take back the last n committed entries, see ``WindowBackbone.rewind``."""
        session.advance(-n)

    def select(self, session: PromptSession, rows: Tensor) -> None:
        """Keep the images ``rows`` [B'] int64, in this order."""
        session.select(rows)

    # --- inside -------------------------------------------------------------------------------------------------

    def _window(self, session: PromptSession, codes: Tensor, slots: Tensor, plan: Plan, hidden: bool) -> StepOut:
        slots = slots.clamp(0, session.layout.length - 1)  # entries past the end only keep windows of one width
        x = self._embed_slots(session, codes, slots).repeat(session.branches, 1, 1)
        positions = self.stream_positions(slots.repeat(session.branches, 1), session.starts, session.layout)
        return self._score(session, self._run(self._compiled or self.body, session.past, plan, x, positions), hidden)

    def _embed_slots(self, session: PromptSession, codes: Tensor, slots: Tensor) -> Tensor:
        if not session.has_forced:
            return self.embed(codes)
        code_ids = self._ids()
        assert code_ids is not None
        forced = session.forced[slots]  # b w
        return self.text_embedding(torch.where(forced >= 0, forced, code_ids[codes]))

    def _run(self, body: Any, past: RaggedCache, plan: Plan, embeddings: Tensor, positions: Tensor) -> Tensor:
        with past.planned(plan) as cache, self._implementation(plan) as implementation:
            return body(
                inputs_embeds=embeddings,
                attention_mask=attention_mask(plan, implementation, embeddings.dtype),
                position_ids=positions,
                use_cache=True,
                **{cache_argument(type(self.body).forward): cache},
            ).last_hidden_state

    @contextmanager
    def _implementation(self, plan: Plan) -> Iterator[str]:
        """The body's attention; where rows differ and it takes no 4-D mask (flash, flex), sdpa for this forward."""
        config = self.body.config
        chosen = config._attn_implementation
        if chosen in MASKED_IMPLEMENTATIONS or plan.mask is None or plan.span is not None:
            yield chosen
            return
        config._attn_implementation = "sdpa"
        try:
            yield "sdpa"
        finally:
            config._attn_implementation = chosen

    def _score(self, session: PromptSession, h: Tensor, hidden: bool) -> StepOut:
        logits = self._code_logits(h).float().to(self.device)  # float32 from here on, whatever the head computes in
        logits = logits.unflatten(0, (session.branches, -1))
        states = h.unflatten(0, (session.branches, -1)) if hidden else None
        if session.mix is not None:
            logits = torch.stack([logits[0], torch.lerp(logits[1], logits[2], session.mix)])
            states = None if states is None else states[[0, 2]]
        return StepOut(logits, states)

    def _code_logits(self, h: Tensor) -> Tensor:
        """Logits of the codes only: a slice of the head's rows where it is a plain linear layer, else of its output."""
        ids = self._ids()
        if ids is None:
            return self.head(h)
        head, first, count = self.head, int(ids[0]), len(ids)
        dense = bool((ids == torch.arange(first, first + count, device=ids.device)).all())
        plain = type(head) is nn.Linear and head.weight.device.type != "meta" and not hooked(head)
        if dense and plain and not head._forward_hooks and not head._forward_pre_hooks:
            rows = slice(first, first + count)
            return nn.functional.linear(h.to(head.weight.device), head.weight[rows], _rows(head.bias, rows))
        logits = head(h)
        return logits[..., first : first + count] if dense else logits.index_select(-1, ids.to(logits.device))


@lru_cache
def cache_argument(function: Any) -> str:
    """What this version of transformers calls the cache that a body, or a maker of masks, is given."""
    return "cache" if "cache" in inspect.signature(function).parameters else "past_key_values"


def compile_body(backbone: FamilyAdapter, options: bool | Mapping[str, Any]) -> Callable[..., Any] | None:
    """A compiled call of the body, None where that cannot work: weights on the CPU or on disk, some quantised layers."""
    places = set(getattr(backbone.model, "hf_device_map", {}).values())
    quantizer = getattr(backbone.model, "hf_quantizer", None)
    offloaded = "disk" in places or ("cpu" in places and len(places) > 1)
    if offloaded or (quantizer is not None and not quantizer.is_compileable):
        return None
    chosen = {"dynamic": False} | (dict(options) if isinstance(options, Mapping) else {})

    def call(**inputs: Any) -> Any:  # a function, so that the compiled module does not become a part of the adapter
        return backbone.body(**inputs)

    return torch.compile(call, **chosen)


def _rows(bias: Tensor | None, rows: slice) -> Tensor | None:
    return None if bias is None else bias[rows]
