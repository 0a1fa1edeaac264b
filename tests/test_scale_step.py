"""The scale step is generic: other tokenizers, other draws, other backbones run through the same sampler unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tiny import tiny_scale_pipeline
from vargen.backbones.decoding.scale import ScaleSession
from vargen.backbones.var.model import VARTransformer
from vargen.kernels.draw import draw
from vargen.protocols import StepOut
from vargen.samplers.scale.next_scale import NextScaleSampler

BITS = 6


class SignTokenizer:
    """Bits in place of a codebook (Infinity, arXiv:2412.04431): unit signs, bilinear resizing, no phi."""

    scales = ((1, 1), (2, 2), (4, 4))
    codebook_size = 2**BITS

    def blank(self, num_images: int) -> Tensor:
        return torch.zeros(num_images, BITS, *self.scales[-1])

    def lookup(self, codes: Tensor) -> Tensor:
        bits = codes[..., None] >> torch.arange(BITS) & 1
        return (2 * bits - 1).float() / BITS**0.5

    def accumulate(self, total: Tensor, vectors: Tensor, k: int) -> Tensor:
        part = vectors.mT.unflatten(2, self.scales[k])
        return total + F.interpolate(part, self.scales[-1], mode="bilinear")

    def shrink(self, total: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(total, size, mode="bilinear").flatten(2).mT

    def decode_latents(self, latents: Tensor) -> Tensor:
        return latents[:, :3]

    def encode(self, features: Tensor) -> list[Tensor]:
        rest, codes = features, []
        for k, size in enumerate(self.scales):
            bits = self.shrink(rest, size) > 0
            codes.append((bits << torch.arange(BITS)).sum(-1))
            rest = rest - self.accumulate(self.blank(len(rest)), self.lookup(codes[-1]), k)
        return codes


class RecurrentBits:
    """Logits for each bit, two a bit, from a running state and no cache at all, as M-VAR carries scales in a state."""

    features, device = frozenset({"scales"}), torch.device("cpu")
    scales, codebook_size = SignTokenizer.scales, SignTokenizer.codebook_size

    def prepare(self, condition: Tensor, guidance_scale: float = 1.0) -> Any:
        class Prepared:
            batch, levels = len(condition), condition.float()

        return Prepared()

    def open(self, prepared: Any, features: Tensor | None = None) -> tuple[dict[str, Tensor], StepOut]:
        session = {"state": prepared.levels[:, None, None].expand(-1, 1, BITS)}
        return session, self._score(session["state"])

    def step(self, session: dict[str, Tensor], features: Tensor) -> StepOut:
        session["state"] = 0.5 * session["state"].mean(1, keepdim=True) + features
        return self._score(session["state"])

    @staticmethod
    def _score(state: Tensor) -> StepOut:
        return StepOut(torch.stack([-state, state], dim=-1).flatten(2)[None])


class BitSampler(NextScaleSampler):
    """Every bit is a draw of its own."""

    def draw_scale(self, state: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
        n, first = logits.shape[2], sum(part.shape[1] for part in state.scales)
        places = (first * BITS + torch.arange(n * BITS)).expand(len(state.seeds), -1)
        flat = logits.unflatten(3, (BITS, 2)).flatten(2, 3)
        bits = draw(flat, seeds=state.keys, positions=places, temperature=self.temperature).unflatten(1, (n, BITS))
        codes = (bits << torch.arange(BITS)).sum(-1)
        return codes, state.tokenizer.lookup(codes)


def test_bits_are_a_setting_of_tokenizer_and_draw():
    tokenizer, backbone = SignTokenizer(), RecurrentBits()
    sure = BitSampler(temperature=0).sample(backbone, torch.tensor([4, -4]), seeds=[0, 1], tokenizer=tokenizer)
    assert [part.shape for part in sure.codes] == [(2, 1), (2, 4), (2, 16)]
    assert sure.codes[0].tolist() == [[2**BITS - 1], [0]]
    rebuilt = tokenizer.blank(2)
    for k, codes in enumerate(sure.codes):
        rebuilt = tokenizer.accumulate(rebuilt, tokenizer.lookup(codes), k)
    torch.testing.assert_close(sure.latents, rebuilt)


def test_drawn_bits_follow_their_logits():
    n = 4000
    output = BitSampler(stop_scale=1).sample(
        RecurrentBits(), torch.ones(n, dtype=torch.int64), seeds=range(n), tokenizer=SignTokenizer()
    )
    share = (output.codes[0] >> torch.arange(BITS) & 1).double().mean(0)
    expected = torch.sigmoid(torch.tensor(2.0)).double()
    assert (share - expected).abs().max() < 4.5 * (expected * (1 - expected) / n).sqrt()


def test_kept_bits_are_coded_like_any_codes():
    tokenizer = SignTokenizer()
    codes = tokenizer.encode(torch.randn(1, BITS, 4, 4, generator=torch.Generator().manual_seed(1)))
    state = BitSampler().start(RecurrentBits(), torch.tensor([1]), seeds=[0], tokenizer=tokenizer, forced_codes=codes)
    assert all(map(torch.equal, state.forced, codes))  # range and shape are checked for 2^d codes


class PrunedVAR(VARTransformer):
    """Token pruning (FastVAR, arXiv:2503.23367), by block: the least changed positions of the last scale skip the blocks."""

    share = 0.0
    seen: list[int]

    def _feed(self, session: ScaleSession, features: Tensor | None) -> StepOut:
        last = session.scale == len(self.sizes) - 1
        condition, first = session.condition, session.scale
        if features is not None:
            features = features.repeat(condition.branches, 1, 1)
        x = self._embed(condition, features, first)
        score = (x - x.mean(1, keepdim=True)).square().sum(-1)
        count = x.shape[1] - int(self.share * x.shape[1]) if last else x.shape[1]
        kept = score.topk(count, dim=1).indices.sort(1).values[..., None].expand(-1, -1, x.shape[2])
        self.seen.append(count)
        plan = session.cache.plan_block(session.used, self._stamps(condition, first, 1)[:count])
        h = self._run(x.gather(1, kept), condition, [session.cache.layer(i, plan) for i in range(len(self.blocks))])
        session.scale, session.used = first + 1, session.used + count
        whole = x.scatter(1, kept, h)
        return StepOut(self._score(whole, condition, features, first).unflatten(0, (condition.branches, -1)))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_pruning_is_a_setting_of_the_backbone(share):
    pipe = tiny_scale_pipeline()
    pruned = PrunedVAR(**{k: v for k, v in pipe.backbone.config.items() if not k.startswith("_")}).eval()
    pruned.load_state_dict(pipe.backbone.state_dict())
    pruned.share, pruned.seen = share, []
    arguments: dict[str, Any] = {"seeds": [0, 1], "tokenizer": pipe.tokenizer}
    sampler = NextScaleSampler(guidance_scale=2.0)
    plain = sampler.sample(pipe.backbone, torch.tensor([1, 2]), **arguments).codes
    found = sampler.sample(pruned, torch.tensor([1, 2]), **arguments).codes
    assert pruned.seen == [1, 4, 16 - int(16 * share)]
    assert torch.equal(plain[1], found[1])
    assert torch.equal(plain[2], found[2]) == (share == 0)
