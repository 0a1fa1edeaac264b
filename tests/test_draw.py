"""Draws have the law of the warped logits, depend on seed and position only, and the kernel draws the reference's codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy.stats import chi2

from vargen.kernels import device as rows
from vargen.kernels.draw import draw, new_errors, raise_errors
from vargen.kernels.language import jit, tl
from vargen.kernels.warp import warp_logits
from vargen.random import Stream, gumbel

NEG = float("-inf")


def place(batch, window=1):
    return {
        "seeds": torch.arange(batch) * 977 + 5,
        "positions": torch.arange(window).expand(batch, -1).contiguous(),
    }


def chi_square(counts, law):
    """p-value of counts under a law; cells of small expectation are pooled."""
    expected = law.double() * counts.sum()
    small = expected < 5
    observed = torch.cat([counts[~small].double(), counts[small].sum()[None].double()])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    keep = expected > 0
    assert observed[~keep].sum() == 0  # something impossible was drawn
    statistic = ((observed - expected)[keep].square() / expected[keep]).sum()
    return float(chi2.sf(float(statistic), int(keep.sum()) - 1))


@pytest.mark.parametrize(
    "settings",
    [{}, {"top_k": 5}, {"top_p": 0.7}, {"temperature": 0.6, "top_k": 9, "top_p": 0.9}, {"guidance_scale": 2.0}],
)
def test_draws_follow_the_warped_law(settings):
    torch.manual_seed(0)
    batch = 100_000
    one = torch.randn(2 if "guidance_scale" in settings else 1, 1, 1, 13)
    codes = draw(one.expand(-1, batch, -1, -1), **place(batch), **settings)
    law = warp_logits(one, **settings)[0, 0].softmax(-1)
    counts = torch.bincount(codes[:, 0], minlength=13)
    assert chi_square(counts, law) > 1e-4
    assert chi_square(counts, law.sqrt() / law.sqrt().sum()) < 1e-12  # the test can fail
    assert chi_square(counts[torch.randperm(13)], law.clamp(min=1e-9)) < 1e-12


def test_neighbouring_positions_and_seeds_are_independent():
    logits = torch.randn(1, 1, 1, 4).expand(1, 50_000, 2, 4)
    codes = draw(logits, **place(50_000, 2))
    law = logits[0, 0, 0].softmax(-1)
    pairs = torch.bincount(codes[:, 0] * 4 + codes[:, 1], minlength=16)
    assert chi_square(pairs, torch.outer(law, law).flatten()) > 1e-4
    seeds = torch.bincount(codes[:-1, 0] * 4 + codes[1:, 0], minlength=16)
    assert chi_square(seeds, torch.outer(law, law).flatten()) > 1e-4


def test_a_draw_does_not_depend_on_the_batch():
    logits = torch.randn(2, 5, 3, 31)
    where = place(5, 3)
    codes = draw(logits, guidance_scale=2.0, top_k=9, **where)
    for image in (3, 0):
        alone = draw(
            logits[:, image : image + 1, 1:],
            guidance_scale=2.0,
            top_k=9,
            seeds=where["seeds"][image : image + 1],
            positions=where["positions"][image : image + 1, 1:],
        )
        assert torch.equal(alone[0], codes[image, 1:])


def test_noise_is_the_gumbel_row_of_stream_position_and_iteration():
    logits, where, step = torch.randn(1, 3, 2, 17), place(3, 2), torch.tensor([1, 5, 2])
    noise = gumbel(where["seeds"], where["positions"], 17, Stream.DRAFT, step)
    drawn = draw(logits, **where, stream=Stream.DRAFT, iteration=step)
    assert torch.equal(drawn, (logits[0] + noise).argmax(-1))
    assert torch.equal(drawn, draw(logits, **where, noise=noise))


def test_temperature_zero_is_the_argmax():
    logits = torch.randn(2, 4, 3, 21)
    codes = draw(logits, guidance_scale=1.5, temperature=0.0, top_k=3, top_p=0.1, **place(4, 3))
    assert torch.equal(codes, (logits[1] + 1.5 * (logits[0] - logits[1])).argmax(-1))


@pytest.mark.parametrize("bad", [float("nan"), NEG, float("inf")])
@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"temperature": 0.0}])
def test_bad_rows_name_image_and_position(on_kernel, bad, kernel, settings):
    logits = torch.randn(1, 2, 2, 9)
    logits[0, 1, 1, :] = bad if bad == NEG else logits[0, 1, 1, :]
    logits[0, 1, 1, 4] = bad
    where = place(2, 2) | {"positions": torch.tensor([[4, 5], [7, 8]])}
    with pytest.raises(ValueError, match="image 1 at position 8"):
        on_kernel(draw, logits, **where, **settings) if kernel else draw(logits, **where, **settings)


def test_a_record_postpones_the_error(on_kernel):
    logits = torch.randn(1, 3, 2, 9)
    logits[0, 1] = float("nan")
    errors = new_errors(3)

    def drawn(logits, errors, **where):
        return draw(logits, errors=errors, **where), errors

    codes, errors = on_kernel(drawn, logits, errors, **place(3, 2))
    assert ((codes >= 0) & (codes < 9)).all()
    with pytest.raises(ValueError, match="image 1 at position 0"):
        raise_errors(errors)
    raise_errors(new_errors(3))


def test_logits_of_other_ranks_or_types_are_named():
    with pytest.raises(ValueError, match=r"\[G, B, W, V\]"):
        draw(torch.randn(3, 2, 2, 9), **place(2, 2))
    with pytest.raises(ValueError, match="int64"):
        draw(torch.zeros(1, 2, 2, 9, dtype=torch.int64), **place(2, 2))


@pytest.mark.parametrize(
    ("num_codes", "window", "dtype", "settings"),
    [
        (4, 7, torch.float32, {}),
        (63, 3, torch.float16, {"top_k": 63}),
        (100, 3, torch.bfloat16, {"top_k": 1}),
        (1000, 2, torch.bfloat16, {"top_p": 0.9}),
        (5000, 1, torch.float32, {"top_k": 300, "top_p": 0.8, "temperature": 0.8}),
        (20000, 1, torch.bfloat16, {"top_k": 2000}),
        (300, 2, torch.float16, {"temperature": 0.0}),
        (300, 2, torch.float32, {"stream": Stream.FRESH, "iteration": torch.tensor([3, 9])}),
    ],
)
def test_kernel_draws_what_the_reference_draws(on_kernel, poisoned, num_codes, window, dtype, settings):
    torch.manual_seed(2)
    logits = (torch.randn(2, 2, window, num_codes) * 2).to(dtype)
    logits[:, 0, 0] = NEG  # a single atom
    logits[:, 0, 0, num_codes // 2] = 1.0
    logits[:, 1, 0, ::2] = 3.0  # many equal values at the top
    where = place(2, window)
    reference = draw(logits, guidance_scale=2.5, **where, **settings)
    assert reference[0, 0] == num_codes // 2
    assert torch.equal(on_kernel(draw, logits, guidance_scale=2.5, **where, **settings), reference)


def test_kernel_takes_strided_views_explicit_noise_and_a_scale_per_image(on_kernel):
    whole = torch.randn(2, 6, 5, 120)
    view = whole[:, ::2, 1:3, 10:90]
    where, noise, scales = place(3, 2), torch.randn(3, 2, 80), torch.tensor([1.0, 2.0, 3.0])
    reference = draw(view, guidance_scale=scales, noise=noise, top_k=20, **where)
    assert torch.equal(on_kernel(draw, view, guidance_scale=scales, noise=noise, top_k=20, **where), reference)


def test_the_noise_on_chip_is_the_noise_of_the_reference(on_kernel):
    """Same bits; the logarithms may differ in their last digits, which is what near ties can hang on."""
    where = {"seeds": torch.tensor([5, -9, 1 << 62]), "positions": torch.tensor([[0, 3], [7, 1 << 20], [2, 2]])}

    def write(seeds, positions):
        out = torch.empty(3, 2, 256, device=seeds.device)
        _noise_kernel[(6,)](seeds, positions, out, W=2, BLOCK=256)
        return out

    noise, reference = on_kernel(write, **where), gumbel(**where, num_codes=256)
    assert torch.allclose(noise, reference, rtol=2e-6, atol=2e-6)
    assert noise.max() > 6


@jit
def _noise_kernel(seeds, positions, out, W: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    seed, position = tl.load(seeds + row // W), tl.load(positions + row)
    noise = rows.gumbel_tile(seed, position, position * 0, position * 0, 0, BLOCK)
    tl.store(out + row * BLOCK + tl.arange(0, BLOCK), noise)


@pytest.mark.gpu
@pytest.mark.parametrize("num_codes", [1024, 4096, 16384, 65536])
def test_compiled_kernel_differs_at_near_ties_only(num_codes):
    torch.manual_seed(3)
    batch, window = 8, 32
    logits = (torch.randn(2, batch, window, num_codes) * 2).to(torch.bfloat16)
    where = place(batch, window)
    settings = {"guidance_scale": 3.0, "top_k": num_codes // 8}
    reference = draw(logits, **where, **settings)
    device = {name: value.cuda() for name, value in where.items()}
    codes = draw(logits.cuda(), **device, **settings).cpu()
    score = warp_logits(logits, **settings) + gumbel(where["seeds"], where["positions"], num_codes)
    gap = score.gather(-1, reference[..., None]) - score.gather(-1, codes[..., None])
    assert (gap < 1e-5).all()
    assert (codes != reference).sum() <= 1  # of 256 rows; expected about 1e-3


def test_operator_survives_compilation():
    where = place(2, 2)

    def step(logits):
        return draw(logits + 1.0, guidance_scale=2.0, top_k=3, **where) * 2

    logits = torch.randn(2, 2, 2, 16)
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(logits), step(logits))


def test_everything_imports_and_draws_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from vargen.kernels import acceptance as rules
from vargen.kernels.verify import shift
from vargen.kernels.verify import verify
from vargen.kernels import draw, nearest
logits, seeds, positions = torch.randn(2, 3, 2, 9), torch.arange(3), torch.arange(2).expand(3, 2)
draw.draw(logits, seeds=seeds, positions=positions, guidance_scale=2.0, top_k=3)
verify.verify_window(
    logits, verify.Draft.none(3, 2), carry="maximal", seeds=seeds, positions=positions, iteration=seeds, num_rows=seeds
)
assert rules.accept.fn(torch.tensor(0.5), torch.tensor(0.5), torch.tensor(0.9))
"""
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(root)}, check=True)
