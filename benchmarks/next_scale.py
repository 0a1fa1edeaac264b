"""Next-scale decoding on one CPU core: vargen beside a plain eager loop, and beside next-token decoding of equal size.

The plain loop is the released algorithm written straight down: modulation computed in every block at every scale, a cache
that grows by concatenation, guidance as batch, a sort for top-p and `torch.multinomial`. Both loops run the same random
weights in turns; before any timing their most likely codes are compared. The second part draws 16x16 grids once with 256
codes in 256 forwards and once with the scales 1, 2, 4, 8, 16 in 5: the two shipped models, trained on the same heroes,
each with its own settings, and two transformers of about three million random parameters with the same guidance. Pixels
are not part of the times.

    python benchmarks/next_scale.py                  # about four minutes, of which VAR-d16 takes two
    python benchmarks/next_scale.py --sizes          # without published sizes
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _common import interleaved_medians, pin_to_core, report, table, write_json
from torch import Tensor

from vargen.backbones.llamagen.model import LlamaGenTransformer
from vargen.backbones.var.model import VARTransformer
from vargen.pipelines.image import ImagePipeline
from vargen.samplers.scale.next_scale import NextScaleSampler
from vargen.samplers.window.next_token import NextTokenSampler
from vargen.tokenizers.multiscale_vq.model import MultiScaleVQTokenizer

SETTINGS = {"guidance_scale": 2.5, "top_k": 900, "top_p": 0.96}  # of the published tables
SMALL_SCALES = (1, 2, 4, 8, 16)
SMALL_CODES = 4096
GUIDANCE = 2.5
REPEATS = 3
PROMPTS = ["deep elf with a red cloak", "dwarf with an axe", "minotaur", "human with a wizard hat and a great sword"]


class PlainLoop:
    """The released sampling loop over the weights of a `VARTransformer`."""

    def __init__(self, model: VARTransformer, tokenizer: MultiScaleVQTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    def block(self, block: Any, x: Tensor, condition: Tensor, cache: list[Tensor]) -> Tensor:
        """One block; `cache` holds keys and values and grows."""
        dim = x.shape[-1]
        rows = block.ada_lin(condition).view(-1, 1, 6, dim).unbind(2)
        gate1, gate2, scale1, scale2, shift1, shift2 = rows
        y = F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale1) + shift1
        attn = block.attn
        bias = torch.cat([attn.q_bias, attn.zero_k_bias, attn.v_bias])
        q, k, v = F.linear(y, attn.mat_qkv.weight, bias).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q = F.normalize(q, dim=-1) * attn.scale_mul_1H11.clamp_max(4.6051702).exp()
        k = F.normalize(k, dim=-1)
        if cache:
            k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
        cache[:] = [k, v]
        y = F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).flatten(2)
        x = x + attn.proj(y) * gate1
        y = F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale2) + shift2
        return x + block.ffn(y) * gate2

    @torch.no_grad()
    def sample(self, labels: Tensor, guidance_scale: float, top_k: int, top_p: float) -> list[Tensor]:
        """Draw the codes of all scales."""
        model, batch = self.model, len(labels)
        condition = model.class_emb(torch.cat([labels, torch.full_like(labels, model.config.num_classes)]))
        position = model.lvl_embed(model.lvl_1L) + model.pos_1LC
        x = condition[:, None] + model.pos_start + position[:, : model.sizes[0]]
        caches: list[list[Tensor]] = [[] for _ in model.blocks]
        total, codes, start = self.tokenizer.blank(batch), [], 0
        for k, size in enumerate(model.sizes):
            for block, cache in zip(model.blocks, caches, strict=True):
                x = self.block(block, x, condition, cache)
            scale, shift = model.head_nm.ada_lin(condition).view(-1, 1, 2, x.shape[-1]).unbind(2)
            logits = model.head(F.layer_norm(x, (x.shape[-1],), eps=1e-6) * (1 + scale) + shift)
            t = (guidance_scale - 1) * k / (len(model.sizes) - 1)
            logits = (1 + t) * logits[:batch] - t * logits[batch:]
            codes.append(self.draw(logits, top_k, top_p))
            total = self.tokenizer.accumulate(total, self.tokenizer.lookup(codes[-1]), k)
            start += size
            if k + 1 < len(model.sizes):
                inputs = model.word_embed(self.tokenizer.shrink(total, model.scales[k + 1])).repeat(2, 1, 1)
                x = inputs + position[:, start : start + model.sizes[k + 1]]
        return codes

    @staticmethod
    def draw(logits: Tensor, top_k: int, top_p: float) -> Tensor:
        """Filter and draw as the released code does."""
        if 0 < top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(top_k)[0][..., -1:], -torch.inf)
        if 0 < top_p < 1:
            ordered, index = logits.sort(dim=-1)
            removed = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
            removed[..., -1:] = False
            logits = logits.masked_fill(removed.scatter(-1, index, removed), -torch.inf)
        return torch.multinomial(logits.softmax(-1).flatten(0, 1), 1).view(logits.shape[:2])


def randomized(model: Any) -> Any:
    """Open what initialisation closes, so that no law is flat."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "ada_lin" in name or "head" in name or "output" in name:
            torch.nn.init.normal_(p, std=0.02)
    return model.eval().requires_grad_(False)


def published(size: str, repeats: int) -> dict[str, Any]:
    """A published size, batch 1: vargen beside the plain loop."""
    torch.manual_seed(0)
    model = randomized(VARTransformer.from_size(size))
    tokenizer = MultiScaleVQTokenizer(base_channels=32, scales=model.scales).eval().requires_grad_(False)
    torch.nn.init.normal_(tokenizer.quantize.embedding.weight, std=0.5)
    return {"model": f"VAR-{size}", **beside_plain_loop(model, tokenizer, 1, repeats)}


def beside_plain_loop(model: Any, tokenizer: Any, batch: int, repeats: int) -> dict[str, Any]:
    """Seconds of one batch with both loops."""
    labels, plain = torch.arange(batch), PlainLoop(model, tokenizer)
    sampler = NextScaleSampler(**SETTINGS)
    greedy = sampler.replace(top_k=1).sample(model, labels, seeds=range(batch), tokenizer=tokenizer).codes
    same = [bool(torch.equal(a, b)) for a, b in zip(greedy, plain.sample(labels, 2.5, 1, 1.0), strict=True)]
    seconds = interleaved_medians(
        {
            "vargen": lambda: sampler.sample(model, labels, seeds=range(batch), tokenizer=tokenizer),
            "plain": lambda: plain.sample(labels, **SETTINGS),
        },
        repeats,
    )
    return {
        "batch": batch,
        "scales with equal most likely codes": f"{sum(same)}/{len(same)}",
        "plain s": seconds["plain"],
        "vargen s": seconds["vargen"],
        "plain / vargen": seconds["plain"] / seconds["vargen"],
    }


def small_pair() -> tuple[VARTransformer, MultiScaleVQTokenizer, LlamaGenTransformer]:
    """Two transformers of about equal size over a 16x16 grid, and the tokenizer of the first."""
    torch.manual_seed(0)
    var = VARTransformer(
        dim=160,
        num_layers=5,
        num_heads=5,
        codebook_size=SMALL_CODES,
        codebook_dim=12,
        scales=SMALL_SCALES,
        mlp_ratio=3,
    )
    next_token = LlamaGenTransformer(
        dim=160, num_layers=6, num_heads=5, codebook_size=SMALL_CODES, ffn_dim=448, rope_base=100.0
    )
    tokenizer = MultiScaleVQTokenizer(
        base_channels=32,
        channel_multipliers=[1, 2],
        codebook_size=SMALL_CODES,
        codebook_dim=12,
        scales=SMALL_SCALES,
        phi_ratio=0.0,
        norm_num_groups=8,
        attention=False,
        encoder_type="patch",
    )
    torch.nn.init.normal_(tokenizer.quantize.embedding.weight, std=0.5)
    return randomized(var), tokenizer.eval().requires_grad_(False), randomized(next_token)


def shipped_pair(batch: int) -> tuple[str, dict[str, tuple[Any, Any, Callable[[], Any]]]]:
    """heroes32-var and heroes32-llamagen, the latter code after code: backbone, sampler and a function that draws."""
    pair = {}
    for kind, name in (("scale", "heroes32-var"), ("token", "heroes32-llamagen")):
        pipe = ImagePipeline.from_pretrained(name)
        if kind == "token":
            pipe.sampler = NextTokenSampler.from_config(pipe.sampler.config)
        condition = pipe.encode_condition(prompt=(PROMPTS * batch)[:batch])
        arguments = {"seeds": list(range(batch)), "tokenizer": pipe.tokenizer.eval()}
        draw = partial(pipe.sampler.sample, pipe.backbone.eval(), condition, **arguments)
        pair[kind] = (pipe.backbone, pipe.sampler, draw)
    return "heroes32-var and heroes32-llamagen", pair


def random_pair(batch: int) -> tuple[str, dict[str, tuple[Any, Any, Callable[[], Any]]]]:
    """Two random transformers of about equal size under the same guidance."""
    var, tokenizer, next_token = small_pair()
    labels, seeds = torch.arange(batch), list(range(batch))
    pair = {}
    for kind, model, sampler in (
        ("scale", var, NextScaleSampler(guidance_scale=GUIDANCE)),
        ("token", next_token, NextTokenSampler(guidance_scale=GUIDANCE)),
    ):
        pair[kind] = (model, sampler, partial(sampler.sample, model, labels, seeds=seeds, tokenizer=tokenizer))
    return "random weights", pair


def beside_next_token(make: Callable[[int], Any], batch: int, repeats: int) -> dict[str, Any]:
    """Images a second of both methods, guided."""
    models, pair = make(batch)
    seconds = interleaved_medians({kind: draw for kind, (_, _, draw) in pair.items()}, repeats)
    (scale, scale_sampler, _), (token, token_sampler, _) = pair["scale"], pair["token"]
    return {
        "models": models,
        "batch": batch,
        "next-scale parameters": scale.num_parameters(),
        "next-token parameters": token.num_parameters(),
        "next-scale forwards": len(scale.scales),
        "next-token forwards": token.num_codes,
        "next-scale images/s": batch / seconds["scale"],
        "next-token images/s": batch / seconds["token"],
        "ratio": seconds["token"] / seconds["scale"],
        "next-scale settings": public(scale_sampler),
        "next-token settings": public(token_sampler),
    }


def public(sampler: Any) -> dict[str, Any]:
    """The settings of a sampler, by name."""
    return {name: getattr(sampler, name) for name in sampler.setting_names()}


def main() -> None:
    """Run the benchmark and write `benchmarks/results/next_scale.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["d16"], help="published sizes, batch 1")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--core", type=int, default=0)
    arguments = parser.parse_args()
    pin_to_core(arguments.core)
    plain = [published(size, arguments.repeats) for size in arguments.sizes]
    var, tokenizer, _ = small_pair()
    for batch in (1, 16):
        plain.append({"model": "VAR 3M", **beside_plain_loop(var, tokenizer, batch, arguments.repeats)})
    pair = [
        beside_next_token(make, batch, arguments.repeats) for make in (shipped_pair, random_pair) for batch in (1, 16)
    ]
    brief = [{name: row[name] for name in row if not name.endswith("settings")} for row in pair]
    print(table(plain), table(brief), sep="\n\n")
    loops = {"settings": SETTINGS, "weights": "random", "rows": plain}
    content = report(beside_plain_loop=loops, beside_next_token=pair)
    print("wrote", write_json("next_scale", content))


if __name__ == "__main__":
    main()
