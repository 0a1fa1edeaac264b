"""One acceptance step of speculative Jacobi decoding: the Triton kernels beside eager PyTorch, torch.compile and peers.

The work of a step: guidance over two branches, temperature, top-k, softmax, the test of every draft against the distribution it
was drawn from, a draw or a residual draw for every row, the number of committed codes, the drafts of the next window.
Candidates that do less say so in their name. On a CUDA device all calls of one candidate over several input sets are
captured in one CUDA graph, so the sets rotate through the L2 cache and no launch overhead counts; times are medians of
CUDA events around replays. ``bandwidth`` is the share of the measured copy bandwidth that reading every logit once,
and once more for rows whose draft was rejected, would take.

    python benchmarks/acceptance_kernel.py                 # on a CUDA device, about eight minutes
    python benchmarks/acceptance_kernel.py --quick         # three shapes
    python benchmarks/acceptance_kernel.py --device cpu    # the PyTorch references only
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from _common import pin_to_core, report, table, write_json
from torch import Tensor

from vargen.kernels.draw import new_errors
from vargen.kernels.verify.shift import shift_window
from vargen.kernels.verify.verify import Draft, VerifyOutcome, verify_window

CODES = (1024, 16384, 65536)
WINDOWS = (1, 16, 32, 64)
BATCHES = (1, 8, 32)
CARRIES = ("gumbel", "maximal", "independent")
GUIDANCE = 3.0
SPREAD = 0.4  # size of the change of the logits from one iteration to the next; about half of the drafts pass
CACHE_BYTES = 128 * 2**20  # input sets together are larger than twice any L2 cache of today
MEMORY_SHARE = 0.5  # of the free memory, the most that input sets may take


class Step:
    """Inputs of one iteration in the middle of a decode, and what the candidates do with them."""

    def __init__(self, num_codes: int, window: int, batch: int, device: str, dtype: torch.dtype, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, generator=generator)

        before = normal(2, batch, window, num_codes) * 2
        self.logits = (before + SPREAD * normal(2, batch, window, num_codes)).to(dtype)
        self.top_k = num_codes // 8
        self.settings = {"guidance_scale": GUIDANCE, "top_k": self.top_k}
        self.where = {
            "seeds": torch.arange(batch, device=device) + 1000 * seed,
            "positions": torch.arange(window, device=device).expand(batch, -1).contiguous(),
            "iteration": torch.full((batch,), 3, device=device),
            "num_rows": torch.full((batch,), window, device=device),
        }
        self.errors = new_errors(batch, device)
        self.draft = self._drafts(before.to(dtype))
        self.probs = _probabilities(before.to(dtype), self.top_k)  # what the eager step stores from the last iteration

    def _drafts(self, before: Tensor) -> Draft:
        """Outcomes of the last iteration as drafts of this one, each labelled with its own row."""
        none = Draft.none(*before.shape[1:3], before.device)
        outcome = verify_window(before, none, carry="maximal", errors=self.errors, **self.where, **self.settings)
        row = torch.arange(before.shape[2], device=before.device).expand_as(outcome.tokens).contiguous()
        return Draft(outcome.tokens, torch.full_like(none.kind, 3), outcome.prob, row, before, outcome.stats)

    @property
    def num_bytes(self) -> int:
        """Bytes of both branches of this iteration."""
        return self.logits.numel() * self.logits.element_size()

    def ours(self, carry: str) -> Callable[[], Any]:
        """Verification and the move of the window, as a decode calls them."""

        def run() -> Draft:
            outcome = verify_window(
                self.logits, self.draft, carry=carry, errors=self.errors, **self.where, **self.settings
            )
            return self.shift(outcome)

        return run

    def shift(self, outcome: VerifyOutcome) -> Draft:
        """The drafts of the next iteration."""
        return shift_window(outcome, self.logits, num_positions=10**6, **self.where)

    def eager(self) -> tuple[Tensor, ...]:
        """The same step in plain PyTorch operators, with the library's own random numbers: the released formulation."""
        return eager_step(self.logits, self.draft.tokens, self.draft.prob, self.probs, self.top_k)


def _probabilities(logits: Tensor, top_k: int) -> Tensor:
    guided = logits[1].float() + GUIDANCE * (logits[0].float() - logits[1].float())
    kth = torch.topk(guided, top_k, sorted=False).values.amin(-1, keepdim=True)
    return guided.masked_fill(guided < kth, float("-inf")).softmax(-1)


def eager_step(logits: Tensor, tokens: Tensor, draft_prob: Tensor, probs: Tensor, top_k: int) -> tuple[Tensor, ...]:
    """Maximal coupling at every row, commit count, and the shifted window."""
    p = _probabilities(logits, top_k)
    p_draft = p.gather(-1, tokens[..., None])[..., 0]
    accepted = torch.rand_like(p_draft) * draft_prob < p_draft
    left = (p - probs).clamp(min=0)
    left = torch.where(left.sum(-1, keepdim=True) > 0, left, p)
    drawn = torch.multinomial(left.flatten(0, 1), 1).view_as(tokens)
    outcome = torch.where(accepted, tokens, drawn)
    committed = (accepted.long().cumprod(-1).sum(-1) + 1).clamp(max=tokens.shape[1])
    column = torch.arange(tokens.shape[1], device=tokens.device) + committed[:, None]
    carried = column < tokens.shape[1]
    at = column.clamp(max=tokens.shape[1] - 1)
    new = torch.randint(p.shape[-1], tokens.shape, device=tokens.device)
    return committed, torch.where(carried, outcome.gather(1, at), new), p


def flashinfer_candidates(step: Step) -> dict[str, Callable[[], Any]]:
    """Draw without a test, and test without a filter: the parts that flashinfer has kernels for."""
    from flashinfer import sampling

    guided = (step.logits[1].float() + GUIDANCE * (step.logits[0].float() - step.logits[1].float())).flatten(0, 1)
    target = _probabilities(step.logits, step.top_k)
    bonus = target[:, -1:]

    def draw() -> Any:
        return sampling.top_k_top_p_sampling_from_logits(guided, step.top_k, 1.0, filter_apply_order="top_k_first")

    def chain() -> Any:
        return sampling.chain_speculative_sampling(
            step.probs, step.draft.tokens.int(), torch.cat([target, bonus], dim=1)
        )

    return {"flashinfer draw only, guided logits": draw, "flashinfer chain test only, given p and q": chain}


def vllm_candidates(step: Step) -> dict[str, Callable[[], Any]]:
    """The rejection kernel of vLLM, second generation, on probabilities that are given."""
    from vllm.v1.sample import rejection_sampler

    batch, window = step.draft.tokens.shape
    target = _probabilities(step.logits, step.top_k).flatten(0, 1)
    drafted = step.draft.tokens.flatten().int()
    bounds = (torch.arange(batch, device=drafted.device) + 1).int() * window
    bonus = step.draft.tokens[:, -1:].int()

    class Metadata:
        all_greedy, all_random, generators = False, True, {}
        temperature = torch.ones(batch, device=drafted.device)

    def chain() -> Any:
        return rejection_sampler.rejection_sample(
            drafted, [window] * batch, window, bounds, step.probs.flatten(0, 1), target, bonus, Metadata
        )

    return {"vLLM chain test only, given p and q": chain}


def candidates(steps: list[Step], device: str) -> tuple[dict[str, list[Callable[[], Any]]], dict[str, str]]:
    """Calls over all input sets by name, and why a candidate is missing."""
    who = "reference" if device == "cpu" else "ours"
    found = {f"{who}, {carry}": [step.ours(carry) for step in steps] for carry in CARRIES}
    missing: dict[str, str] = {}
    if device == "cpu":
        return found, missing
    found["eager"] = [step.eager for step in steps]
    compiled = torch.compile(eager_step, fullgraph=True, dynamic=False)
    found["torch.compile of eager"] = [
        lambda s=step: compiled(s.logits, s.draft.tokens, s.draft.prob, s.probs, s.top_k) for step in steps
    ]
    for name, make in (("flashinfer", flashinfer_candidates), ("vLLM", vllm_candidates)):
        try:
            for step in steps:
                for label, call in make(step).items():
                    found.setdefault(label, []).append(call)
        except Exception as error:  # not installed, or another version's interface
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found, missing


def referenced(calls: list[Callable[[], Any]]) -> list[Callable[[], Any]]:
    """The same calls through the PyTorch references."""

    def switched(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            os.environ["VARGEN_KERNELS"] = "torch"
            try:
                return call()
            finally:
                del os.environ["VARGEN_KERNELS"]

        return run

    return [switched(call) for call in calls]


def graph_seconds(calls: list[Callable[[], Any]], repeats: int = 20) -> float:
    """Median seconds of one call, all of them captured in one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return event_seconds(graph.replay, repeats) / len(calls)


def event_seconds(call: Callable[[], Any], repeats: int = 20) -> float:
    """Median seconds between CUDA events around ``call``."""
    times = []
    for index in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        if index >= 3:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def launched_seconds(calls: list[Callable[[], Any]], repeats: int = 5) -> float:
    """Median seconds of one call made from Python, launches included."""

    def every() -> None:
        for call in calls:
            call()

    return event_seconds(every, repeats) / len(calls)


def clock_seconds(calls: list[Callable[[], Any]], repeats: int = 7) -> float:
    """Median CPU seconds of one call of this thread."""
    times = []
    for index in range(repeats + 1):
        start = time.thread_time()
        for call in calls:
            call()
        if index:
            times.append((time.thread_time() - start) / len(calls))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a device copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / event_seconds(lambda: target.copy_(source))


def measure(num_codes: int, window: int, batch: int, device: str, bandwidth: float) -> tuple[list[dict], dict]:
    """Rows of the table for one shape."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    first = Step(num_codes, window, batch, device, dtype, 0)
    sets = 1
    if device == "cuda":
        room = MEMORY_SHARE * torch.cuda.mem_get_info()[0] / (8 * first.num_bytes)
        sets = max(1, min(-(-CACHE_BYTES // first.num_bytes), 64, int(room)))
    steps = [first, *(Step(num_codes, window, batch, device, dtype, seed) for seed in range(1, sets))]
    calls, missing = candidates(steps, device)
    outcomes = [verify_window(s.logits, s.draft, carry="maximal", **s.where, **s.settings) for s in steps]
    rejected = 1.0 - float(torch.stack([v.accepted.float().mean() for v in outcomes]).mean())
    shape = {"V": num_codes, "W": window, "B": batch, "rejected": rejected, "sets": sets}
    rows = []
    for name, group in calls.items():
        row: dict[str, Any] = {**shape, "candidate": name}
        if device == "cpu":
            row["ms"] = 1e3 * clock_seconds(group)
        else:
            try:
                seconds = graph_seconds(group)
                row["us"] = 1e6 * seconds
                again = rejected if "maximal" in name else 0.0
                row["bandwidth"] = first.num_bytes * (1 + again) / seconds / bandwidth
            except Exception as error:  # not capturable, out of memory: say so and go on
                missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            row["us launched"] = 1e6 * launched_seconds(group)
        rows.append(row)
    if device == "cuda" and (num_codes, window) in ((1024, 16), (16384, 16)):
        plain = referenced(calls["ours, maximal"][:4])
        rows.append({**shape, "candidate": "reference, maximal (eager)", "us launched": 1e6 * launched_seconds(plain)})
        rows.append(_compiled_reference(steps[:4], shape, missing))
    return rows, missing


def _compiled_reference(steps: list[Step], shape: dict[str, Any], missing: dict[str, str]) -> dict[str, Any]:
    """torch.compile of the reference; it picks rows by value, so the graph breaks there."""
    from vargen.kernels.verify.reference import verify_reference
    from vargen.kernels.verify.types import Place, VerifyNoise
    from vargen.kernels.warp import WarpSettings

    def step_of(s: Step) -> Callable[[], Any]:
        given = (Place(**s.where), WarpSettings(GUIDANCE, top_k=s.top_k), None, VerifyNoise())
        return lambda: compiled(s.logits, s.draft, "maximal", *given)

    compiled = torch.compile(verify_reference)
    row: dict[str, Any] = {**shape, "candidate": "torch.compile of the reference, without the shift"}
    try:
        calls = [step_of(step) for step in steps]
        row["us launched"] = 1e6 * launched_seconds(calls)
    except Exception as error:
        missing["torch.compile of the reference"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return row


def shapes(device: str, quick: bool) -> list[tuple[int, int, int]]:
    """(V, W, B) to measure."""
    if quick:
        return [(1024, 16, 1), (16384, 16, 8), (65536, 16, 1)] if device == "cuda" else [(1024, 16, 1), (16384, 16, 1)]
    batches = BATCHES if device == "cuda" else (1, 8)
    codes = CODES if device == "cuda" else (1024, 4096, 16384)
    every = [(v, w, b) for v in codes for w in WINDOWS for b in batches]
    return [(v, w, b) for v, w, b in every if v * w * b <= (2**27 if device == "cuda" else 2**21)]


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a few shapes only")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds after which no new shape is started")
    parser.add_argument("--core", type=int, default=0, help="core to stay on with --device cpu")
    parser.add_argument("--name", help="file in benchmarks/results/; acceptance_kernel_<device> without it")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("no CUDA device here; `--device cpu` times the PyTorch references\n")
        return 1
    if device == "cpu":
        pin_to_core(arguments.core)
    bandwidth = copy_bandwidth() if device == "cuda" else 0.0
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    started, skipped = time.monotonic(), []
    for shape in shapes(device, arguments.quick):
        if time.monotonic() - started > arguments.limit:
            skipped.append(shape)
            continue
        torch.compiler.reset()
        found, absent = measure(*shape, device, bandwidth)
        rows += found
        missing |= absent
        sys.stdout.write(table(found) + "\n\n")
        sys.stdout.flush()
    results = {"settings": {"guidance_scale": GUIDANCE, "top_k": "V / 8", "temperature": 1.0, "spread": SPREAD}}
    results |= {"rows": rows, "missing": missing, "skipped_for_time": skipped}
    if device == "cuda":
        results["copy_bytes_per_second"] = bandwidth
    path = write_json(arguments.name or f"acceptance_kernel_{device}", report(**results))
    for name, reason in missing.items():
        sys.stdout.write(f"not measured: {name} ({reason})\n")
    sys.stdout.write(f"written to {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
