"""Arguments and buffers that the kernels of a window share.

Letters: G guidance branches, B images, W window, V codes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vargen.kernels import device
from vargen.kernels.language import triton
from vargen.kernels.verify import triton_kernels as kernels
from vargen.kernels.verify.group import Groups
from vargen.kernels.verify.label import Drafts
from vargen.kernels.verify.types import CARRIES, Carry, Draft, GroupSpec, Place, VerifyNoise, VerifyOutcome
from vargen.kernels.warp import WarpSettings, dense_rows


def launch(
    logits: Tensor,
    draft: Draft,
    carry: Carry,
    place: Place,
    settings: WarpSettings,
    group: GroupSpec | None,
    noise: VerifyNoise,
    errors: Tensor,
) -> VerifyOutcome:
    """Decide a window with the kernels; arguments as of ``reference.verify_reference``."""
    logits = dense_rows(logits)
    outcome = _empty_outcome(logits)
    batch, window = outcome.tokens.shape
    number, greedy = CARRIES.index(carry), settings.temperature == 0
    search = settings.search_arguments(logits.shape[-1])
    outcomes = kernels.Outcomes(
        outcome.tokens, outcome.accepted.view(torch.uint8), outcome.prob, torch.empty_like(outcome.prob), outcome.stats
    )
    labels = dense_rows(logits if draft.logits is None else draft.logits)
    common = settings.row_arguments(logits) | {
        "drafts": _drafts(draft, labels, outcome.stats, settings),
        "label_rows": labels.shape[2],
        "LABEL_GUIDED": labels.shape[0] == 2,
        "places": _places(place, draft.tokens),
        "given": _given(noise, outcome.stats),
        "outcomes": outcomes,
        "W": window,
        "FORCED": place.forced is not None,
        "GIVEN": noise.fresh is not None,
    }
    grouped = _group_arguments(group, outcome.stats)
    kernels.rows_kernel[(window, batch)](**common, **search, **grouped, errors_ptr=errors, CARRY=number, GREEDY=greedy)
    kernels.finish_kernel[(batch,)](
        **common,
        committed_ptr=outcome.num_committed,
        CARRY=CARRIES.index("gumbel") if greedy else number,  # an argmax stands whatever is before it
        WINDOW=triton.next_power_of_2(window),
    )
    return outcome


def _empty_outcome(logits: Tensor) -> VerifyOutcome:
    shape, device_of = tuple(logits.shape[1:3]), logits.device
    tokens, committed = (torch.empty(size, dtype=torch.int64, device=device_of) for size in (shape, shape[:1]))
    prob, stats = (torch.empty(size, dtype=torch.float32, device=device_of) for size in (shape, (*shape, 2)))
    return VerifyOutcome(tokens, torch.empty(shape, dtype=torch.bool, device=device_of), prob, committed, stats)


def _drafts(draft: Draft, labels: Tensor, of_target: Tensor, settings: WarpSettings) -> Drafts:
    stats = draft.stats
    if stats is None:  # NONE labels only, or statistics that are missing
        stats = of_target if draft.logits is None else _label_stats(labels, settings)
    tokens, kind, prob, row = (value.contiguous() for value in (draft.tokens, draft.kind, draft.prob, draft.row))
    return Drafts(tokens, kind, prob, row, device.Logits(labels, *labels.stride()[:3]), stats.contiguous())


def _label_stats(labels: Tensor, settings: WarpSettings) -> Tensor:
    _, batch, rows, num_codes = labels.shape
    stats = torch.empty(batch, rows, 2, dtype=torch.float32, device=labels.device)
    arguments = settings.row_arguments(labels) | settings.search_arguments(num_codes)
    kernels.stats_kernel[(rows, batch)](**arguments, stats_ptr=stats, W=rows)
    return stats


def _places(place: Place, filler: Tensor) -> kernels.Places:
    given = (place.seeds, place.positions, place.iteration, place.num_rows)
    forced = filler if place.forced is None else place.forced
    return kernels.Places(*(value.contiguous() for value in (*given, forced)))


def _given(noise: VerifyNoise, filler: Tensor) -> kernels.Given:
    given = (noise.accept, noise.fresh, noise.residual)
    return kernels.Given(*(filler if value is None else value.float().contiguous() for value in given))


def _group_arguments(group: GroupSpec | None, filler: Tensor) -> dict[str, Any]:
    spec = group or GroupSpec(size=0)
    table = spec.embeddings
    codes, dim = (0, 0) if table is None else table.shape
    pointer = filler if table is None else table.float().contiguous()
    return {
        "group": Groups(pointer, dim, spec.prob_threshold, spec.distance_threshold),
        "group_codes": codes,
        "HALF": spec.size // 2,
        "CLOSE": table is not None,
        "DIM": 16 if table is None else triton.next_power_of_2(dim),
    }
