"""Adapters of transformers models: the ten promises, on tiny models with the library's own numbers as reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from tests.adapter_cases import BUILDERS, Case, case
from vargen.samplers.window.jacobi import SpeculativeJacobiSampler
from vargen.samplers.window.next_token import NextTokenSampler

TOLERANCE = 1e-4  # of the reference's README
FAMILIES = list(BUILDERS)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def greedy(scale: float, window: int = 1):
    settings = {"guidance_scale": scale, "temperature": 0.0}
    return NextTokenSampler(**settings) if window == 1 else SpeculativeJacobiSampler(window=window, **settings)


def draw(sampler, c: Case, prompts=None, scale: float = 1.0):
    prompts = c.prompts if prompts is None else prompts
    seeds = range(len(prompts["input_ids"]))
    backbone = c.backbone
    if scale != 1 and c.negative is not None:
        backbone = WithNegative(backbone, c.negative)
    return sampler.sample(backbone, prompts, seeds=seeds)


class WithNegative:
    """Gives every ``prepare`` the reference's negative prompts."""

    def __init__(self, backbone, negative):
        self.backbone, self.negative = backbone, negative

    def __getattr__(self, name):
        return getattr(self.backbone, name)

    def prepare(self, condition, *, guidance_scale):
        rows = len(self.backbone.read(condition))
        negative = {k: v[:1].expand(rows, -1) if len(v) != rows else v for k, v in self.negative.items()}
        return self.backbone.prepare(condition, guidance_scale=guidance_scale, negative=negative)


def prepared(c: Case, rows=slice(None), scale: float | None = None):
    prompts = {name: value[rows] for name, value in c.prompts.items()}
    scale = c.scale if scale is None else scale
    negative = None if c.negative is None or scale == 1 else {k: v[rows] for k, v in c.negative.items()}
    return c.backbone.prepare(prompts, guidance_scale=scale, negative=negative)


def slots_of(c: Case) -> tuple[Tensor, Tensor]:
    """Every slot up to the last code, and the number of the code in it (0 at structural ones)."""
    free = c.backbone.layout().forced < 0
    last = int(free.nonzero()[-1])
    number = torch.where(free, free.long().cumsum(0) - 1, 0)[: last + 1]
    return free[: last + 1], number


def teacher_forced(c: Case, widths, rows=slice(None), scale: float | None = None) -> Tensor:
    """[G, B, N, V] logits of all codes when the reference's codes are fed in windows of these widths."""
    free, number = slots_of(c)
    codes = c.forced[rows][:, number]  # b s
    session, out = c.backbone.open(prepared(c, rows, scale), max_window=max(widths))
    logits, at = [out.logits], 0
    for width in widths:
        width = min(width, codes.shape[1] - 1 - at)
        if width < 1:
            break
        logits.append(c.backbone.step(session, codes[:, at : at + width]).logits)
        c.backbone.commit(session, width)
        at += width
    return torch.cat(logits, dim=2)[:, :, free]


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_codes_are_the_librarys_own(name: str) -> None:
    c = case(name)
    for scale, codes in c.greedy.items():
        out = draw(greedy(scale), c, scale=scale)
        assert torch.equal(out.codes, codes), scale
        assert out.stats.num_forwards == len(slots_of(c)[0])
        if c.streams is not None:
            assert torch.equal(c.backbone.to_stream(out.codes), c.streams[scale])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("window", [2, 4, 7])
def test_windows_with_rejections_give_the_same_greedy_codes(name: str, window: int) -> None:
    c = case(name)
    out = draw(greedy(c.scale, window), c, scale=c.scale)
    assert torch.equal(out.codes, c.greedy[c.scale])
    assert out.stats.num_forwards <= len(slots_of(c)[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_first_logits_of_both_branches(name: str) -> None:
    c = case(name)
    for scale, expected in c.logits4.items():
        session, out = c.backbone.open(prepared(c, scale=scale))
        free, number = slots_of(c)
        found = [out.logits]
        for slot in range(int(free.nonzero()[3])):
            found.append(c.backbone.step(session, c.greedy[scale][:, number[slot], None]).logits)
            c.backbone.commit(session, 1)
        found = torch.cat(found, dim=2)[:, :, free[: len(found)]]
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("widths", [[1] * 40, [40], [3, 5, 2] * 6], ids=["ones", "all", "mixed"])
def test_teacher_forced_logits_for_any_split(name: str, widths: list[int]) -> None:
    c = case(name)
    found = teacher_forced(c, widths)
    torch.testing.assert_close(found, c.forced_logits[: len(found)], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_rejected_drafts_leave_no_trace(name: str) -> None:
    """Ragged: image 0 commits one entry more than image 1; wrong drafts lie behind."""
    c = case(name)
    free, number = slots_of(c)
    codes = c.forced[:, number]
    session, out = c.backbone.open(prepared(c), max_window=4)
    at = torch.tensor([0, 0])
    generator = torch.Generator().manual_seed(0)
    seen = torch.full(c.forced_logits[:, :, :, 0].shape[1:], False)
    for _ in range(60):
        index = at[:, None] + torch.arange(4)
        window = codes.gather(1, index.clamp(max=codes.shape[1] - 1))
        good = torch.tensor([2, 1])
        wrong = torch.randint(c.backbone.codebook_size, window.shape, generator=generator)
        window = torch.where(torch.arange(4) < good[:, None], window, wrong)
        out = c.backbone.step(session, window)
        for b in range(2):
            for j in range(int(good[b])):
                slot = int(at[b]) + j + 1
                if slot < len(free) and free[slot]:
                    expected = c.forced_logits[: len(out.logits), b, number[slot]]
                    torch.testing.assert_close(out.logits[:, b, j], expected, atol=TOLERANCE, rtol=0)
                    seen[b, number[slot]] = True
        good = torch.minimum(good, len(free) - 1 - at).clamp(min=0)
        c.backbone.commit(session, good)
        at += good
    assert bool(seen[:, 1:].all())  # everything but the prefill's row was compared


@pytest.mark.parametrize("name", FAMILIES)
def test_batch_rows_are_single_rows(name: str) -> None:
    c = case(name)
    both = teacher_forced(c, [3] * 14)
    for b in range(2):
        alone = teacher_forced(c, [3] * 14, rows=slice(b, b + 1))
        torch.testing.assert_close(both[:, b : b + 1], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_guidance_1_runs_one_branch(name: str) -> None:
    c = case(name)
    found = teacher_forced(c, [4] * 10, scale=1.0)
    assert len(found) == 1
    torch.testing.assert_close(found, c.forced_logits[:1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_eager_attention_is_sdpa_attention(name: str) -> None:
    c, eager = case(name), BUILDERS[name](attn_implementation="eager")
    assert eager.backbone.body.config._attn_implementation == "eager"
    torch.testing.assert_close(teacher_forced(eager, [3] * 14), teacher_forced(c, [3] * 14), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_bool_mask_would_be_wrong_with_eager_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the test above: the mask's form matters."""
    eager = BUILDERS[name](attn_implementation="eager")
    monkeypatch.setattr("vargen.adapters.base.attention_mask", lambda plan, *_: plan.mask)
    found = teacher_forced(eager, [3] * 14)
    assert float((found - eager.forced_logits[: len(found)]).abs().max()) > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_librarys_caches_give_the_same_logits(name: str, kind: str) -> None:
    c, backbone = case(name), case(name).backbone
    rows = slice(0, 1)
    free, number = slots_of(c)
    packed = prepared(c, rows, scale=1.0)
    text = backbone.config.get_text_config(decoder=True)
    length = packed.ids.shape[1]
    past = DynamicCache(config=text) if kind == "dynamic" else StaticCache(config=text, max_cache_len=96)
    session, _ = backbone.open(packed, max_window=4)
    embeddings = [backbone.text_embedding(packed.ids)]
    codes = c.forced[rows][:, number]
    slots = torch.arange(len(free))[None]
    embeddings.append(backbone._embed_slots(session, codes, slots))
    positions = [
        backbone.prompt_positions(torch.arange(length), packed.lengths),
        backbone.stream_positions(slots, packed.lengths, session.layout),
    ]
    x, position = torch.cat(embeddings, 1), torch.cat(positions, -1)
    hidden, at = [], 0
    with torch.no_grad():
        for width in [length, *[4] * 10]:
            window = slice(at, at + width)
            if at >= x.shape[1] - 1:
                break
            out = backbone.body(
                inputs_embeds=x[:, window], position_ids=position[..., window], past_key_values=past, use_cache=True
            )
            hidden.append(out.last_hidden_state)
            at += width
        logits = backbone._code_logits(torch.cat(hidden, 1)[:, length - 1 :])[:, : len(free)]
    torch.testing.assert_close(logits[:, free], c.forced_logits[0, rows], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_pixels(name: str) -> None:
    c = case(name)
    if c.pixels is None:
        pytest.skip("this model has no pixel decoder")
    decoder = c.backbone.pixels()
    for scale, expected in c.pixels.items():
        h, w = c.backbone.grid_size
        found = decoder.decode(c.greedy[scale].unflatten(1, (h, w)))
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
        assert found.shape[-1] == w * decoder.downsample


@pytest.mark.parametrize("name", FAMILIES)
def test_select_mid_way(name: str) -> None:
    c = case(name)
    free, number = slots_of(c)
    codes = c.forced[:, number]
    session, _ = c.backbone.open(prepared(c), max_window=3)
    c.backbone.step(session, codes[:, :3])
    c.backbone.commit(session, torch.tensor([2, 3]))
    c.backbone.select(session, torch.tensor([1]))
    assert session.length.tolist() == [3]
    out = c.backbone.step(session, codes[1:, 3:6])
    for j in range(3):
        if free[4 + j]:
            expected = c.forced_logits[: len(out.logits), 1:, number[4 + j]]
            torch.testing.assert_close(out.logits[:, :, j], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_is_finite_and_close(name: str) -> None:
    """A bf16 mantissa has 8 bits: distributions agree to a few percent, codes need not."""
    c = case(name)
    half = BUILDERS[name](dtype=torch.bfloat16)
    found = teacher_forced(half, [4] * 10)
    assert found.dtype == torch.float32
    assert bool(found.isfinite().all())
    p, q = found[0].softmax(-1), c.forced_logits[0].softmax(-1)
    assert float((p - q).abs().sum(-1).mean() / 2) < 0.1
    shuffled = q.roll(1, -1)  # a control: unrelated distributions are far
    assert float((p - shuffled).abs().sum(-1).mean() / 2) > 0.2


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("window", [2, 5, 16])
def test_gumbel_mode_gives_the_codes_of_next_token_sampling(name: str, window: int) -> None:
    c = case(name)
    settings = {"guidance_scale": c.scale, "temperature": 0.7, "top_k": 8}
    expected = draw(NextTokenSampler(**settings), c, scale=c.scale)
    out = draw(SpeculativeJacobiSampler(window=window, **settings), c, scale=c.scale)
    assert torch.equal(out.codes, expected.codes)
    assert out.stats.num_forwards < expected.stats.num_forwards
    assert len(expected.codes.unique()) > 4


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("batch", [1, 3])
def test_live_generate_agrees_before_and_after(name: str, batch: int) -> None:
    """The library's own loop, run now, on one and on three prompts; and the model is as it was afterwards."""
    c = case(name)
    rows = [1] if batch == 1 else [0, 1, 0]
    prompts = {key: value[rows] for key, value in c.prompts.items()}
    expected = c.generate(prompts, c.scale)
    out = draw(greedy(c.scale, 4), Case(**{**vars(c), "negative": _take(c.negative, rows)}), prompts, scale=c.scale)
    assert torch.equal(out.codes, expected)
    assert torch.equal(c.generate(prompts, c.scale), expected)


def _take(negative, rows):
    return None if negative is None else {key: value[rows] for key, value in negative.items()}
