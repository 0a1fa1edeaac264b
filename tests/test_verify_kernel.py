"""The Triton kernels of verification decide exactly as their PyTorch reference; compiled ones differ at near ties only."""

import pytest
import torch

from tests.windows import assert_same, scene
from vargen.kernels.draw import new_errors, raise_errors
from vargen.kernels.verify import verify
from vargen.kernels.verify.verify import Draft, GroupSpec, VerifyNoise, verify_window

CARRIES = ["gumbel", "maximal", "independent", "none"]


@pytest.mark.parametrize("carry", CARRIES)
@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 2.0, "top_k": 20},
        {"guidance_scale": torch.tensor([1.0, 2.0, 3.0]), "temperature": 0.7},
        {"temperature": 0.0},
    ],
    ids=["top_k", "per_image", "greedy"],
)
def test_kernel_equals_reference(on_kernel, poisoned, carry, settings):
    logits, draft, where = scene(**settings)
    reference = verify_window(logits, draft, carry=carry, **where, **settings)
    kernel = on_kernel(verify_window, logits, draft, carry=carry, **where, **settings)
    assert_same(kernel, reference, where["num_rows"], settings)
    assert (reference.num_committed > 0).all()


@pytest.mark.parametrize(
    ("carry", "shape", "settings"),
    [
        ("maximal", {"num_codes": 7, "batch": 7, "window": 3}, {"top_k": 7}),
        ("maximal", {"num_codes": 100, "batch": 2, "window": 3, "dtype": torch.bfloat16}, {"top_k": 9, "top_p": 0.8}),
        ("independent", {"num_codes": 130, "batch": 2, "window": 4, "branches": 1, "dtype": torch.float16}, {}),
        ("gumbel", {"num_codes": 100, "batch": 2, "window": 3}, {"top_p": 0.9}),
        ("independent", {"num_codes": 20000, "batch": 2, "window": 2}, {"top_k": 500}),
        ("none", {"num_codes": 64, "batch": 2, "window": 17}, {}),
        ("gumbel", {"num_codes": 64, "batch": 2, "window": 63}, {"temperature": 0.0}),
    ],
)
def test_kernel_equals_reference_at_other_sizes(on_kernel, poisoned, carry, shape, settings):
    logits, draft, where = scene(seed=1, **shape, **settings)
    reference = verify_window(logits, draft, carry=carry, **where, **settings)
    kernel = on_kernel(verify_window, logits, draft, carry=carry, **where, **settings)
    assert_same(kernel, reference, where["num_rows"], settings)


@pytest.mark.parametrize("carry", CARRIES)
def test_a_window_of_one_row(on_kernel, poisoned, carry):
    logits, draft, where = scene(seed=8)
    one = Draft(*[value[:, :1] for value in (draft.tokens, draft.kind, draft.prob, draft.row)], draft.logits)
    where |= {"positions": where["positions"][:, :1], "num_rows": torch.tensor([1, 1, 0])}
    reference = verify_window(logits[:, :, :1], one, carry=carry, **where)
    assert_same(
        on_kernel(verify_window, logits[:, :, :1], one, carry=carry, **where), reference, where["num_rows"], {}
    )
    assert reference.num_committed.tolist() == [1, 1, 0]


@pytest.mark.parametrize("carry", CARRIES)
def test_forced_positions_and_finished_images(on_kernel, poisoned, carry):
    logits, draft, where = scene(seed=2)
    forced = torch.full_like(draft.tokens, -1)
    forced[0, 0] = draft.tokens[0, 0]  # drafted as it must be
    forced[0, 2], forced[2, 0] = 5, 6
    logits[:, 0, 2] = float("nan")  # a forced row is not looked at
    where["num_rows"][1] = 0
    logits[:, 1] = float("nan")  # nor is a finished image
    settings = {"forced": forced, "top_k": 20}
    reference = verify_window(logits, draft, carry=carry, **where, **settings)
    kernel = on_kernel(verify_window, logits, draft, carry=carry, **where, **settings)
    assert_same(kernel, reference, where["num_rows"], settings)
    assert reference.num_committed[1] == 0
    assert (reference.tokens[1] == -1).all()
    assert reference.accepted[0, 0]
    reached = reference.num_committed[0] > 2
    assert carry == "none" or reference.tokens[0, 2] == 5 or not reached
    assert reference.prob[2, 0] == 1.0
    assert reference.tokens[2, 0] == 6


@pytest.mark.parametrize(("carry", "known"), [("maximal", None), ("independent", 40), ("maximal", 63)])
def test_groups(on_kernel, poisoned, carry, known):
    settings = {"top_k": 30}
    logits, draft, where = scene(seed=3, batch=2, window=4, **settings)
    logits[0, 0, 0, ::3] = 1.5  # ties inside the group
    table = None if known is None else torch.randn(known, 5, generator=torch.Generator().manual_seed(0)) * 0.3
    group = GroupSpec(prob_threshold=0.05, embeddings=table)
    reference = verify_window(logits, draft, carry=carry, group=group, **where, **settings)
    kernel = on_kernel(verify_window, logits, draft, carry=carry, group=group, **where, **settings)
    assert_same(kernel, reference, where["num_rows"], settings)


def test_explicit_noise(on_kernel, poisoned):
    logits, draft, where = scene(seed=4)
    batch, window, num_codes = logits.shape[1:]
    noise = VerifyNoise(
        torch.rand(batch, window), torch.randn(batch, window, num_codes), torch.randn(batch, window, num_codes)
    )
    for carry in CARRIES:
        reference = verify_window(logits, draft, carry=carry, noise=noise, **where)
        kernel = on_kernel(verify_window, logits, draft, carry=carry, noise=noise, **where)
        assert_same(kernel, reference, where["num_rows"], {})


def test_stored_statistics_stand_for_the_label_distribution(on_kernel, poisoned):
    settings = {"guidance_scale": 2.0, "top_k": 11, "top_p": 0.9}
    logits, draft, where = scene(seed=5, **settings)
    first = verify_window(
        draft.logits[:, :, :-1], Draft.none(*draft.tokens.shape), carry="maximal", **where, **settings
    )
    second = draft.with_logits(draft.logits[:, :, :-1], first.stats)
    second = Draft(second.tokens, second.kind, second.prob, second.row.clamp(max=4), second.logits, second.stats)
    bare = second.with_logits(second.logits, None)
    where["num_rows"][:] = 5
    with_stats = verify_window(logits, second, carry="maximal", **where, **settings)
    without = verify_window(logits, bare, carry="maximal", **where, **settings)
    kernel = on_kernel(verify_window, logits, second, carry="maximal", **where, **settings)
    assert torch.equal(with_stats.tokens, without.tokens)
    assert_same(kernel, with_stats, where["num_rows"], settings)


@pytest.mark.parametrize("carry", CARRIES)
def test_bad_rows_name_image_and_position(on_kernel, carry):
    logits, draft, where = scene(seed=6)
    logits[0, 2, 1, 4] = float("nan")
    position = int(where["positions"][2, 1])
    with pytest.raises(ValueError, match=f"image 2 at position {position} "):
        verify_window(logits, draft, carry=carry, **where)
    with pytest.raises(ValueError, match=f"image 2 at position {position} "):
        on_kernel(verify_window, logits, draft, carry=carry, **where)

    def recorded(logits, draft, errors, **where):
        verify_window(logits, draft, carry=carry, errors=errors, **where)
        return errors

    errors = on_kernel(recorded, logits, draft, new_errors(3), **where)
    with pytest.raises(ValueError, match="image 2"):
        raise_errors(errors)


@pytest.mark.gpu
@pytest.mark.parametrize("carry", ["gumbel", "maximal"])  # rows decide for themselves, so a flip stays alone
@pytest.mark.parametrize("num_codes", [1024, 4096, 16384, 65536])
def test_compiled_kernel_rarely_differs(on_kernel, carry, num_codes):
    settings = {"guidance_scale": 3.0, "top_k": num_codes // 8}
    differing = rows = 0
    for seed in range(4):
        logits, draft, where = scene(num_codes, 8, 33, seed=seed, dtype=torch.bfloat16, **settings)
        reference = verify_window(logits, draft, carry=carry, **where, **settings)
        kernel = on_kernel(verify_window, logits, draft, carry=carry, **where, **settings)
        differing += int((kernel.tokens != reference.tokens).sum())
        rows += reference.tokens.numel()
    assert differing <= 1 + rows // 500  # rows whose two best scores, or whose test, lie within rounding


def test_operator_survives_compilation():
    logits, draft, where = scene(seed=7)

    def step(logits):
        outcome = verify_window(logits * 1.0, draft, carry="maximal", top_k=9, **where)
        return outcome.tokens, outcome.num_committed

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(logits)
    for ours, wanted in zip(compiled, step(logits), strict=True):
        assert torch.equal(ours, wanted)


def test_operator_keeps_its_promises(monkeypatch):
    """Schema, fake and mutation, as torch checks them."""
    logits, draft, where = scene(seed=7)
    calls = []
    monkeypatch.setattr(verify, "_verify", lambda *given: calls.append(given) or [None] * 5)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    verify_window(logits, draft, carry="maximal", top_k=9, **where)
    monkeypatch.undo()
    torch.library.opcheck(verify._verify, calls[0])
