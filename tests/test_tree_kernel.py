"""Tree verification, kernel against reference: same uniforms, same path, same distribution behind it."""

import pytest
import torch

from tests.tree_toys import TreeTabular
from vargen.kernels.tree import verify
from vargen.kernels.tree.lantern import RESIDUALS, Relaxation
from vargen.kernels.tree.verify import verify_tree
from vargen.samplers.drafters.tree import Tree, TreeDraft
from vargen.samplers.window.lantern import LanternSampler

SHAPES = {
    "chain": "0 00 000",
    "siblings": "0 1 2 3",
    "tree": "0 1 2 00 01 10 20 000 001 100",
}
SIZE = 67  # no power of two


def scene(name, proposal, *, batch=6, guided=True, seed=0, sharpness=1.5):
    """Raw logits, proposals drawn near the target's distributions, and what verification needs beside them."""
    torch.manual_seed(seed)
    tree = Tree.from_paths([[int(digit) for digit in word] for word in SHAPES[name].split()])
    n, inner = tree.num_nodes, [node for level in tree.inner() for node in level]
    logits = sharpness * torch.randn(1 + guided, batch, n, SIZE)
    row_of = torch.full((n,), -1)
    row_of[inner] = torch.arange(len(inner))
    near = logits[0][:, inner] + 0.7 * torch.randn(batch, len(inner), SIZE)
    distributions = near.softmax(-1)
    tokens = torch.zeros(batch, n, dtype=torch.int64)
    for row, node in enumerate(inner):
        kids = [kid for kid in tree.children[0, node].tolist() if kid >= 0]
        if proposal == "top":
            drawn = distributions[:, row].topk(len(kids)).indices
        else:
            drawn = distributions[:, row].multinomial(len(kids), replacement=proposal == "with_replacement")
        tokens[:, kids] = drawn
    tokens[1, 2] = -1  # nothing proposed there
    sampled = proposal != "top"
    draft = TreeDraft(
        tree,
        tokens,
        distributions if sampled else None,
        row_of if sampled else None,
        replacement=proposal == "with_replacement",
    )
    limit = torch.full((batch,), tree.max_depth + 1)
    limit[2], limit[3] = 2, 0  # one near its end, one finished
    slots = torch.arange(tree.max_depth + 1).expand(batch, -1)
    return logits, draft, torch.rand(batch, n), {"limit": limit, "positions": slots}


def table(width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(SIZE - 1, generator=generator)[:width] for _ in range(SIZE)]).int()


def compare(on_kernel, arguments, options, settings):
    logits, draft, uniforms = arguments
    arguments = (logits, draft.proposals, uniforms)
    reference = verify_tree(*arguments, **options, **settings)
    kernel = on_kernel(verify_tree, *arguments, **options, **settings)
    for name in ("path", "tokens", "num_accepted", "num_uniforms", "num_relaxed"):
        assert torch.equal(getattr(kernel, name), getattr(reference, name)), name
    torch.testing.assert_close(kernel.distribution, reference.distribution, rtol=1e-4, atol=1e-6)
    return reference


EXACT = [
    ("top", {"guidance_scale": 2.0, "top_k": 20}),
    ("with_replacement", {}),
    ("without_replacement", {"guidance_scale": 1.5, "top_p": 0.8, "temperature": 0.7}),
    ("without_replacement", {}),
]


@pytest.mark.parametrize(("proposal", "warp"), EXACT, ids=str)
def test_exact_trees_equal_the_reference(on_kernel, poisoned, proposal, warp):
    tested = kept = 0
    for number, name in enumerate(SHAPES):
        *arguments, options = scene(name, proposal, guided=bool(warp), seed=number)
        found = compare(on_kernel, arguments, options, warp)
        tested, kept = tested + int(found.num_uniforms.sum()), kept + int(found.num_accepted.sum())
    assert 0 < kept < tested


RELAXED = [("with_replacement", "paper"), ("with_replacement", "upstream")]
RELAXED += [(proposal, residual) for proposal in ("top", "without_replacement") for residual in RESIDUALS]


@pytest.mark.parametrize(("proposal", "residual"), RELAXED)
def test_relaxed_trees_equal_the_reference(on_kernel, poisoned, proposal, residual):
    relaxed = 0
    for number, limit in enumerate(({"delta": 0.3}, {"lam": 9.0})):
        seed = 2 * RESIDUALS.index(residual) + number + 20
        *arguments, options = scene("tree", proposal, batch=10, seed=seed, sharpness=1.0)
        relaxation = Relaxation(table(9), 7, residual=residual, **limit)
        settings = {"relaxation": relaxation, "guidance_scale": 1.5}
        relaxed += int(compare(on_kernel, arguments, options, settings).num_relaxed.sum())
    assert relaxed > 0


def test_fixed_codes_and_dynamic_shapes_equal_the_reference(on_kernel):
    logits, draft, uniforms, options = scene("tree", "top", seed=40)
    forced = torch.full_like(options["positions"], -1)
    forced[0, 0], forced[4, 1], forced[5, 0] = draft.tokens[0, 1], 3, 5
    compare(on_kernel, (logits, draft, uniforms), options, {"forced": forced})
    parents = draft.tree.parents.expand(len(draft.tokens), -1).clone()
    parents[1, 5] = 1  # one image has another shape
    tree = Tree.from_parents(parents, draft.tree.max_depth, 4)
    compare(on_kernel, (logits, TreeDraft(tree, draft.tokens), uniforms), options, {})


def test_a_distribution_without_a_rest_is_kept(on_kernel):
    """The target holds nothing but what was rejected."""
    tree = Tree.chain(1)
    logits = torch.full((1, 2, 2, SIZE), -40.0)
    logits[..., 5] = 40.0
    draft = TreeDraft(
        tree, torch.tensor([[0, 5], [0, 6]]), logits[0, :, :1].softmax(-1).clone(), torch.tensor([0, -1])
    )
    draft.distributions[1] = torch.nn.functional.one_hot(torch.tensor(6), SIZE)
    options = {"limit": torch.tensor([2, 2]), "positions": torch.zeros(2, 2, dtype=torch.int64)}
    uniforms = torch.tensor([[1.0, 0.0], [0.5, 0.0]])  # 1 rejects even what is certain
    found = compare(on_kernel, (logits, draft, uniforms), options, {})
    assert found.num_accepted.tolist() == [0, 0]
    assert found.distribution[:, 5].tolist() == [1.0, 1.0]


def test_bad_rows_are_named(on_kernel):
    logits, draft, uniforms, options = scene("chain", "top", seed=50)
    logits[:, 4] = float("nan")
    with pytest.raises(ValueError, match="image 4 at position 0 are NaN"):
        on_kernel(verify_tree, logits, draft.proposals, uniforms, **options)


def compiled(function, *tensors):
    return torch.compile(function, fullgraph=True, backend="aot_eager")(*tensors)


@pytest.mark.parametrize("relaxed", [False, True])
def test_operator_survives_compilation(relaxed):
    logits, draft, uniforms, options = scene("tree", "without_replacement", seed=60)
    relaxation = Relaxation(table(9), 7, lam=9.0, residual="upstream") if relaxed else None

    def step(logits, uniforms):
        found = verify_tree(logits * 1.0, draft.proposals, uniforms, relaxation=relaxation, top_k=20, **options)
        return found.path, found.tokens, found.num_accepted, found.distribution, found.num_uniforms, found.num_relaxed

    for ours, wanted in zip(compiled(step, logits, uniforms), step(logits, uniforms), strict=True):
        assert torch.equal(ours, wanted)
    done = {**options, "limit": torch.zeros_like(options["limit"])}  # every image is finished
    left = compiled(lambda x: verify_tree(x, draft.proposals, uniforms, **done).distribution, logits)
    assert left.shape == (len(uniforms), SIZE)


def test_operator_keeps_its_promises(monkeypatch):
    """Schema, fake and mutation, as torch checks them."""
    logits, draft, uniforms, options = scene("tree", "without_replacement", seed=61)
    calls = []
    monkeypatch.setattr(verify, "_verify_tree", lambda *given: calls.append(given) or [None] * 6)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    verify_tree(logits, draft.proposals, uniforms, **options)
    monkeypatch.undo()
    torch.library.opcheck(verify._verify_tree, calls[0])


@pytest.mark.parametrize(
    "settings", [{"tree": "mc_sim_7b_63"}, {"tree": "chain", "relaxation": "lantern++", "k": 1}], ids=str
)
def test_samplers_draw_the_same_codes_with_it(on_kernel, settings):
    target, drafter = TreeTabular(3, (2, 3), seed=0), TreeTabular(3, (2, 3), seed=0)
    drafter.table = drafter.table + 0.7 * torch.randn(drafter.table.shape, generator=torch.Generator().manual_seed(7))
    sampler = LanternSampler(**{"relaxation": "none", **settings})
    options = {"drafter": drafter, "seeds": range(6)}
    if sampler.guarantee == "relaxed":
        options["neighbors"] = torch.tensor([[1, 2], [2, 0], [1, 0]])

    def draw():
        return sampler.sample(target, torch.ones(6, dtype=torch.int64), **options).codes

    if torch.cuda.is_available():
        pytest.skip("the toy models live on the CPU")
    assert torch.equal(on_kernel(draw), draw())
