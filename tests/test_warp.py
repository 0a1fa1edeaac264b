"""Guidance, temperature, top-k and top-p: the official rules, corner cases, and the kernel against its reference."""

import pytest
import torch

from vargen.kernels.warp import warp_logits

NEG = float("-inf")


def official(logits, top_k, top_p, temperature):
    """The filter of LlamaGen's sampler, one row at a time and in plain words."""
    z = logits / max(temperature, 1e-5)
    if top_k > 0:
        z = z.masked_fill(z < z.sort(descending=True).values[min(top_k, len(z)) - 1], NEG)
    if top_p < 1:
        order = z.argsort(descending=True, stable=True)
        cumulative = z[order].softmax(-1).cumsum(-1)
        remove = torch.cat([torch.tensor([False]), (cumulative > top_p)[:-1]])
        z = z.masked_fill(torch.zeros_like(remove).scatter(0, order, remove), NEG)
    return z


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"), [(0, 1.0, 1.0), (7, 1.0, 0.7), (0, 0.6, 1.3), (20, 0.5, 1.0)]
)
def test_keeps_what_the_official_filter_keeps(top_k, top_p, temperature):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 63) * 2
    warped = warp_logits(logits, guidance_scale=3.0, temperature=temperature, top_k=top_k, top_p=top_p)
    guided = logits[1] + 3.0 * (logits[0] - logits[1])
    for image in range(3):
        for row in range(4):
            wanted = official(guided[image, row], top_k, top_p, temperature)
            assert torch.equal(warped[image, row] == NEG, wanted == NEG)
            assert torch.allclose(warped[image, row].softmax(-1), wanted.softmax(-1), atol=1e-6)


def test_ties_with_the_last_kept_value_stay():
    z = torch.tensor([3.0, 1.0, 2.0, 1.0, 1.0, 0.0])[None, None, None]
    assert (warp_logits(z, top_k=3)[0, 0] > NEG).tolist() == [True, True, True, True, True, False]
    assert (warp_logits(z, top_k=3, top_p=0.95)[0, 0] > NEG).tolist() == [True, True, True, True, True, False]
    assert (warp_logits(z, top_p=0.6)[0, 0] > NEG).tolist() == [True, False, True, False, False, False]


def test_the_code_that_crosses_top_p_is_kept_and_one_code_always_is():
    z = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()[None, None, None]
    assert (warp_logits(z, top_p=0.6)[0, 0] > NEG).tolist() == [True, True, False, False]
    assert (warp_logits(z, top_p=1e-6)[0, 0] > NEG).tolist() == [True, False, False, False]


def test_top_p_is_a_share_of_what_top_k_left(on_kernel):
    """Dies here: top-p of the mass of all codes, from which top-k took most."""
    z = (
        -0.2 * torch.arange(9.0)[None, None, None]
    )  # of three kept codes 0.40, 0.33, 0.27; of all nine 0.22, 0.18, 0.15
    kept = [True, True] + [False] * 7
    assert (warp_logits(z, top_k=3, top_p=0.7)[0, 0] > NEG).tolist() == kept
    assert (on_kernel(warp_logits, z, top_k=3, top_p=0.7)[0, 0] > NEG).tolist() == kept


def official_top_p_first(logits, top_k, top_p, temperature):
    """The order of LANTERN's code: top-p of the whole distribution, then top-k of what is left."""
    return official(official(logits, 0, top_p, temperature) * temperature, top_k, 1.0, temperature)


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 0.7), (20, 0.5), (5, 0.99), (62, 0.8), (1, 0.3)])
def test_top_p_first_keeps_what_the_official_filters_keep_in_that_order(on_kernel, top_k, top_p):
    torch.manual_seed(3)
    logits, differ = torch.randn(1, 2, 2, 63) * 2, False
    warped = warp_logits(logits, temperature=0.9, top_k=-top_k, top_p=top_p)
    for image in range(2):
        for row in range(2):
            wanted = official_top_p_first(logits[0, image, row], top_k, top_p, 0.9)
            assert torch.equal(warped[image, row] == NEG, wanted == NEG)
            differ |= not torch.equal(wanted == NEG, official(logits[0, image, row], top_k, top_p, 0.9) == NEG)
    assert differ == (top_k in (3, 20))  # the control: the two orders can be told apart
    few = logits[:, :1, :1]
    assert torch.equal(
        on_kernel(warp_logits, few, top_k=-top_k, top_p=top_p), warp_logits(few, top_k=-top_k, top_p=top_p)
    )


def test_top_p_first_without_one_of_the_two():
    z = torch.randn(1, 1, 2, 20)
    assert torch.equal(warp_logits(z, top_k=-4), warp_logits(z, top_k=4))
    assert torch.equal(warp_logits(z, top_k=-20, top_p=0.6), warp_logits(z, top_p=0.6))


def test_top_k_of_nothing_or_everything_changes_nothing():
    z = torch.randn(1, 2, 3, 9)
    for k in (0, 9, 12):
        assert torch.equal(warp_logits(z, top_k=k), z[0])


def test_a_code_masked_in_both_branches_stays_masked():
    logits = torch.randn(2, 1, 1, 6)
    logits[:, 0, 0, 2] = NEG
    logits[0, 0, 0, 4] = NEG
    warped = warp_logits(logits, guidance_scale=2.0)
    assert (warped[0, 0] == NEG).tolist() == [False, False, True, False, True, False]
    assert not warped.isnan().any()


def test_guidance_scale_may_differ_from_image_to_image():
    logits = torch.randn(2, 3, 2, 8)
    scales = torch.tensor([1.0, 2.5, 4.0])
    together = warp_logits(logits, guidance_scale=scales, temperature=0.5)
    for image, scale in enumerate(scales.tolist()):
        alone = warp_logits(logits[:, image : image + 1], guidance_scale=scale, temperature=0.5)
        assert torch.equal(together[image], alone[0])


def test_half_precision_is_read_exactly_and_the_input_is_left_alone():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        logits = torch.randn(1, 2, 1, 40).to(dtype)
        kept = logits.clone()
        assert torch.equal(warp_logits(logits, top_k=5), warp_logits(logits.float(), top_k=5))
        assert torch.equal(logits, kept)


@pytest.mark.parametrize(
    ("num_codes", "settings"),
    [
        (7, {"top_k": 5}),
        (100, {"top_p": 0.8, "temperature": 0.7}),
        (100, {"top_k": 6, "top_p": 0.7}),
        (20000, {"top_k": 5}),
    ],
)
def test_kernel_equals_reference(on_kernel, poisoned, num_codes, settings):
    torch.manual_seed(1)
    logits = (torch.randn(2, 2, 1, num_codes + 3) * 2).to(torch.bfloat16)[..., :num_codes]  # many ties; a strided view
    logits[0, 0, 0, 1:4] = NEG
    scales = torch.tensor([2.0, 3.5])
    reference = warp_logits(logits, guidance_scale=scales, **settings)
    assert torch.equal(on_kernel(warp_logits, logits, guidance_scale=scales, **settings), reference)


def test_operator_survives_compilation():
    def step(logits):
        return warp_logits(logits * 2.0, top_k=3).softmax(-1)

    logits = torch.randn(1, 2, 1, 16)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits), step(logits))
