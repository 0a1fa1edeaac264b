"""Next-token decoding on one CPU core: vargen beside a plain hand-written loop and the memory's own limit.

Both loops run the same random weights, the same condition and the same number of codes, in turns, at several depths of
the cache; before any timing their logits are compared. A step is one forward pass and the draw of one code an image,
noise included. The limit is the time to read every weight and the filled part of the cache once, at the bandwidth
measured in the same run. Times are CPU times of the one thread, so that other processes on the machine count less.

    python benchmarks/next_token.py                # LlamaGen-B, about two minutes
    python benchmarks/next_token.py --compile      # and with the blocks through torch.compile
    python benchmarks/next_token.py --sizes L --batches 1 --depths 112     # a larger model on few steps
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from _common import pin_to_core, read_bandwidth, report, table, write_json
from torch import Tensor

from vargen.backbones.llamagen.model import LlamaGenTransformer
from vargen.samplers.window.next_token import NextTokenSampler

GRID = (16, 16)
DEPTHS = (16, 112, 224)  # codes already drawn when a timed segment begins
SEGMENT = 16  # codes of a timed segment: whole blocks of vargen's noise at every batch size used here
REPEATS = 3
GUIDANCE = 2.0
LABEL = 207


class PlainLoop:
    """What one would write after reading gpt-fast: fused projections, one static cache, a causal mask row, SDPA over the
    whole cache, guidance as batch, a draw without a sort."""

    def __init__(self, model: LlamaGenTransformer, batch: int, guided: bool) -> None:
        config, rows = model.config, batch * (2 if guided else 1)
        self.batch, self.guided, self.rows = batch, guided, rows
        self.heads, self.head_dim = config.num_heads, config.dim // config.num_heads
        self.embedding, self.head = model.tok_embeddings.weight, model.output.weight
        self.norm, self.eps = model.norm.weight, config.norm_eps
        self.layers = [
            (
                layer.attention_norm.weight,
                layer.attention.wqkv.weight,
                layer.attention.wo.weight,
                layer.ffn_norm.weight,
                torch.cat([layer.feed_forward.w1.weight, layer.feed_forward.w3.weight]),
                layer.feed_forward.w2.weight,
            )
            for layer in model.layers
        ]
        length = (1 + model.num_codes + 7) // 8 * 8
        self.keys = torch.zeros(len(self.layers), rows, self.heads, length, self.head_dim)
        self.values = torch.zeros_like(self.keys)
        self.mask = torch.ones(length, length, dtype=torch.bool).tril()
        self.rope = model.rope_table()
        labels = torch.full((batch,), LABEL)
        null = torch.full((batch,), config.num_classes)
        self.condition = model.cls_embedding(torch.cat([labels, null]) if guided else labels)[:, 0]
        self.position, self.codes = 0, torch.zeros(batch, dtype=torch.int64)

    def start(self) -> None:
        """Feed the condition and draw the first code."""
        self.draw(self.forward(self.condition))

    def move_to(self, depth: int) -> None:
        """Pretend that ``depth`` codes are drawn."""
        self.position = depth

    def forward(self, x: Tensor) -> Tensor:
        """One item of every row, ``[R, D]``, at the current position: logits ``[R, V]``."""
        p = self.position
        turn = self.rope[p]  # d/2 2
        mask = self.mask[p][None, None, None]
        for index, (norm1, wqkv, wo, norm2, w13, w2) in enumerate(self.layers):
            qkv = F.linear(self._rms(x, norm1), wqkv).view(self.rows, 3, self.heads, self.head_dim)
            query, key = self._rotate(qkv[:, 0], turn), self._rotate(qkv[:, 1], turn)
            self.keys[index, :, :, p] = key
            self.values[index, :, :, p] = qkv[:, 2]
            y = F.scaled_dot_product_attention(query[:, :, None], self.keys[index], self.values[index], attn_mask=mask)
            x = x + F.linear(y.reshape(self.rows, -1), wo)
            gate, up = F.linear(self._rms(x, norm2), w13).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, w2)
        self.position += 1
        return F.linear(self._rms(x, self.norm), self.head)

    def step(self) -> None:
        """Feed the last codes, draw the next."""
        rows = self.codes.repeat(2) if self.guided else self.codes
        self.draw(self.forward(self.embedding[rows]))

    def draw(self, logits: Tensor) -> None:
        """gpt-fast's draw: no synchronisation, no sort."""
        if self.guided:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + GUIDANCE * (conditional - unconditional)
        probs = logits.softmax(-1)
        self.codes = (probs / torch.empty_like(probs).exponential_(1)).argmax(-1)

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * weight

    @staticmethod
    def _rotate(x: Tensor, turn: Tensor) -> Tensor:
        a, b = x[..., 0::2], x[..., 1::2]  # R H d/2
        cos, sin = turn.unbind(-1)
        return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


class VargenLoop:
    """NextTokenSampler through its public loop, moved to a depth without drawing the codes before it."""

    def __init__(self, model: LlamaGenTransformer, batch: int, guided: bool) -> None:
        self.sampler = NextTokenSampler(guidance_scale=GUIDANCE if guided else 1.0)
        labels = torch.full((batch,), LABEL)
        self.state = self.sampler.start(model, labels, seeds=list(range(batch)))
        self.state.tokens.clamp_(min=0)  # the codes behind which a segment begins

    def move_to(self, depth: int) -> None:
        """Pretend that ``depth`` codes are drawn; what the cache holds does not change the time."""
        moved = depth - self.state.num_forwards
        self.state.session.advance(moved)
        self.state.length += moved
        self.state.num_forwards = depth
        self.state.done = False

    def step(self) -> None:
        """One forward pass and one code an image."""
        self.state = self.sampler.step(self.state)


def check_same_logits(model: LlamaGenTransformer, batch: int, guided: bool) -> float:
    """Largest difference between the two loops' logits after the condition and two codes."""
    plain = PlainLoop(model, batch, guided)
    prepared = model.prepare(torch.full((batch,), LABEL), guidance_scale=GUIDANCE if guided else 1.0)
    session, out = model.open(prepared)
    worst = float((plain.forward(plain.condition) - out.logits.flatten(0, 2)).abs().max())
    for code in (5, 300):
        codes = torch.full((batch, 1), code)
        out = model.step(session, codes)
        model.commit(session, 1)
        ours = plain.forward(plain.embedding[codes[:, 0].repeat(plain.rows // batch)])
        worst = max(worst, float((ours - out.logits.flatten(0, 2)).abs().max()))
    if worst > 1e-3:
        raise ValueError(f"the two loops differ by {worst:.3g} in their logits; their times cannot be compared")
    return worst


def compiled_copy(model: LlamaGenTransformer) -> LlamaGenTransformer:
    """The same weights, not copied, with compiled blocks."""
    with torch.device("meta"):
        copy = LlamaGenTransformer.from_config(model.config)
    copy.load_state_dict(model.state_dict(), assign=True)
    copy.eval().requires_grad_(False).compile_repeated_blocks(fullgraph=True)
    return copy


def time_loops(loops: dict[str, Any], depth: int, repeats: int) -> dict[str, float]:
    """Seconds a step of every loop at one depth: they take turns step by step, in changing order; medians of segments."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for repeat in range(repeats + 1):  # the first one warms up
        for loop in loops.values():
            loop.move_to(depth)
        spent = dict.fromkeys(loops, 0.0)
        for step in range(SEGMENT):
            for name in list(loops)[:: 1 if step % 2 else -1]:
                start = time.process_time()
                loops[name].step()
                spent[name] += time.process_time() - start
        for name in loops if repeat else ():
            seconds[name].append(spent[name] / SEGMENT)
    return {name: statistics.median(times) for name, times in seconds.items()}


def limit(model: LlamaGenTransformer, rows: int, depth: int, bandwidth: float) -> float:
    """Seconds to read what a step must read: all weights but the embedding tables, and the filled cache."""
    tables = model.tok_embeddings.weight.numel() + model.cls_embedding.embedding_table.weight.numel()
    weights = sum(parameter.numel() for parameter in model.parameters()) - tables
    cache = 2 * len(model.layers) * rows * (depth + SEGMENT // 2) * model.config.dim
    return 4 * (weights + cache) / bandwidth


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time every configuration."""
    bandwidth = read_bandwidth()
    rows: list[dict[str, Any]] = []
    for size in arguments.sizes:
        torch.manual_seed(0)
        model = LlamaGenTransformer.from_size(size, grid_size=GRID).eval().requires_grad_(False)
        torch.nn.init.normal_(model.output.weight, std=0.02)
        compiled = compiled_copy(model) if arguments.compile else None
        for batch in arguments.batches:
            for guided in (False, True):
                difference = check_same_logits(model, batch, guided)
                loops: dict[str, Any] = {"vargen": VargenLoop(model, batch, guided)}
                loops["plain"] = PlainLoop(model, batch, guided)
                if compiled is not None:
                    loops["compiled"] = VargenLoop(compiled, batch, guided)
                loops["plain"].start()
                for depth in arguments.depths:
                    seconds = time_loops(loops, depth, arguments.repeats)
                    floor = limit(model, batch * (2 if guided else 1), depth, bandwidth)
                    shape = {"model": f"LlamaGen-{size}", "batch": batch, "guidance": guided, "depth": depth}
                    rows.append(shape | summary(seconds, batch, floor) | {"logits_difference": difference})
                print(table(rows[-len(arguments.depths) :]), flush=True)
    notes = (
        f"one core, CPU time, float32, loops take turns step by step, {SEGMENT} steps a segment, median of "
        f"{arguments.repeats}; a step is one forward pass and one draw; compiled = blocks through torch.compile"
    )
    return report(benchmark="next_token", notes=notes, read_bandwidth_gb_s=round(bandwidth / 1e9, 2), rows=rows)


def summary(seconds: dict[str, float], batch: int, floor: float) -> dict[str, float]:
    """One row of the table, times in milliseconds a step."""
    row = {f"{name}_ms": round(time * 1e3, 2) for name, time in seconds.items()}
    row["plain_over_vargen"] = round(seconds["plain"] / seconds["vargen"], 3)
    if "compiled" in seconds:
        row["plain_over_compiled"] = round(seconds["plain"] / seconds["compiled"], 3)
    row["codes_per_second"] = round(batch / seconds["vargen"], 1)
    return row | {"floor_ms": round(floor * 1e3, 2), "share_of_floor": round(floor / seconds["vargen"], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["B"], help="LlamaGen sizes")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--depths", nargs="+", type=int, default=list(DEPTHS), help="codes already drawn, at most 239")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="timed segments of a configuration")
    parser.add_argument(
        "--compile", action="store_true", help="also time torch.compile of the blocks (compiles first)"
    )
    parser.add_argument("--core", type=int, default=1, help="core to stay on")
    parser.add_argument("--name", default="next_token_cpu", help="file in benchmarks/results/")
    arguments = parser.parse_args()
    pin_to_core(arguments.core)
    with torch.inference_mode():
        results = measure(arguments)
    print(write_json(arguments.name, results))


if __name__ == "__main__":
    main()
