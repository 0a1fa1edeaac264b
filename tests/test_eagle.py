"""EAGLE drafters: official numbers, the hand-off between target and drafter, and the distribution of what comes out."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from tests.conftest import GOLDEN
from tests.enumeration import chi_square_p, sequence_law
from tests.tiny import CODEBOOK_SIZE, GRID, tiny_backbone, tiny_tokenizer
from vargen.draft_models.eagle import EagleDrafter
from vargen.kernels.warp import warp_logits
from vargen.samplers.drafters.tree import Tree
from vargen.samplers.drafters.tree_drafts import draft_fixed, draft_likeliest
from vargen.samplers.window.decoder import WindowSampler
from vargen.samplers.window.lantern import LanternSampler
from vargen.samplers.window.next_token import NextTokenSampler

XL_SHAPES = {
    "embed_tokens.weight": (16384, 1280),
    "fc.weight": (1280, 2560),
    "fc.bias": (1280,),
    **{f"layers.0.self_attn.{name}_proj.weight": (1280, 1280) for name in "qkvo"},
    "layers.0.mlp.gate_proj.weight": (3584, 1280),
    "layers.0.mlp.up_proj.weight": (3584, 1280),
    "layers.0.mlp.down_proj.weight": (1280, 3584),
    "layers.0.post_attention_layernorm.weight": (1280,),
}


@pytest.fixture
def stored(golden):
    return golden("lantern/drafter")


class Head:
    """What a drafter needs of its backbone: sizes and the head."""

    hidden_size, codebook_size, grid_size, num_condition_tokens = 32, 64, (16, 16), 120
    features = frozenset({"hidden"})

    def __init__(self, weight):
        self.output = nn.Linear(32, 64, bias=False)
        self.output.weight = nn.Parameter(weight)

    def head_logits(self, hidden):
        return self.output(hidden)


@pytest.fixture
def official(stored):
    weights = {key.removeprefix("weights."): value for key, value in stored.items() if key.startswith("weights.")}
    return EagleDrafter.from_original(weights, grid_size=(16, 16), num_heads=4, num_condition_tokens=120)


def opened(official, stored):
    """A draft session after the published prefill, and the logits behind it."""
    session = official.open_drafts(Head(stored["lm_head.weight"]), branches=2, batch=1, max_nodes=100)
    count = stored["fwd.input_ids"].shape[1]
    root = session.extend(stored["fwd.input_ids"][:1], stored["fwd.hidden_states"][:, None], torch.tensor([count]))
    return session, root


# ---------------------------------------------------------------------------------------------------- official numbers


@torch.no_grad()
def test_the_forward_is_the_official_one(official, stored):
    out = official(stored["fwd.hidden_states"], official.embed(stored["fwd.input_ids"]))
    torch.testing.assert_close(out, stored["fwd.out"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_cache_is_the_official_one(official, stored):
    session, _ = opened(official, stored)
    assert session.lengths.tolist() == [120]
    torch.testing.assert_close(session.cache.keys[0][:, :, :120], stored["fwd.k_cache"], rtol=0, atol=1e-5)
    torch.testing.assert_close(session.cache.values[0][:, :, :120], stored["fwd.v_cache"], rtol=0, atol=1e-5)
    root = session.extend(stored["inc.input_ids"][:1], stored["inc.hidden_states"][:, None], torch.tensor([3]))
    torch.testing.assert_close(session.features[:, 0, 0], stored["inc.out"][:, -1], rtol=0, atol=1e-5)
    torch.testing.assert_close(root[:, 0], stored["inc.out"][:, -1] @ stored["lm_head.weight"].T, rtol=0, atol=1e-4)
    assert session.lengths.tolist() == [123]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["greedy", "sample"])
def test_dynamic_trees_are_the_official_ones(official, stored, kind):
    with safe_open(GOLDEN / "lantern" / "drafter.safetensors", "pt") as file:
        facts = file.metadata()
    settings = {"guidance_scale": float(facts["cfg_scale"])}
    if kind == "sample":
        settings["top_k"] = int(facts["logits_top_k"])
    session, root = opened(official, stored)
    for call in range(2):
        expected = {name: stored[f"dyn_{kind}.call{call}.{name}"] for name in ("draft_tokens", "tree_mask")}
        if call:
            tokens = stored[f"dyn_{kind}.call1.new_tokens"]
            hidden = stored[f"dyn_{kind}.call1.hidden_states"][:, None]
            root = session.extend(tokens, hidden, torch.tensor([tokens.shape[1]]))
        draft = draft_likeliest(
            session,
            root,
            warp=lambda raw: warp_logits(raw, **settings),
            depth=int(facts["depth"]) + 1,
            branching=int(facts["top_k"]),
            num_nodes=int(facts["total_tokens"]),
            leaf_order=kind == "greedy",
        )
        assert torch.equal(draft.tokens[:, 1:], expected["draft_tokens"][:, 1:])
        assert torch.equal(draft.tree.mask[0], expected["tree_mask"][0, 0].bool())
        assert torch.equal(draft.tree.depth[0], stored[f"dyn_{kind}.call{call}.tree_position_ids"])
        assert torch.equal(draft.tree.rows(), stored[f"dyn_{kind}.call{call}.retrieve_indices"])


@torch.no_grad()
def test_fixed_trees_are_the_official_ones(official, stored, golden):
    rows = []

    def warp(raw):
        rows.append(warp_logits(raw, guidance_scale=3.0)[0])
        return rows[-1][None]

    # in float64, so that no processor's rounding counts: what remains are the official float32 numbers' own 1.0e-3
    exact = {key: value.double() if value.is_floating_point() else value for key, value in stored.items()}
    session, root = opened(official.double(), exact)
    draft = draft_fixed(session, root, Tree.named("naive_extend_57"), warp=warp, proposal="top")
    logits, tokens = torch.cat(rows).topk(10)
    assert torch.equal(tokens, stored["static_greedy.tokens"])
    torch.testing.assert_close(logits, stored["static_greedy.logits"], rtol=0, atol=2e-3)
    flat = torch.cat([torch.zeros(1, dtype=torch.int64), tokens.flatten()])
    index = golden("lantern/tree_buffers", "naive_extend_57.")["verify.tree_indices"]
    assert torch.equal(draft.tokens[0, 1:], flat[index][1:])


def test_sampled_rows_have_the_conditional_probabilities_of_draws_without_replacement(stored):
    full, tokens, given = (stored[f"static_sample.{name}"] for name in ("full_probs", "tokens", "cond_probs"))
    drawn = full.gather(1, tokens)
    left = 1 - torch.cat([torch.zeros(len(drawn), 1), drawn.cumsum(1)[:, :-1]], dim=1)
    expected = (drawn / left).nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-5)


def test_the_published_drafter_has_the_published_shapes(tmp_path):
    with torch.device("meta"):
        model = EagleDrafter(num_condition_tokens=120, grid_size=(16, 16))
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == XL_SHAPES
    assert round(sum(value.numel() for value in model.state_dict().values()) / 1e6, 2) == 44.57


# -------------------------------------------------------------------------------------------------------------- files


def small(**config):
    torch.manual_seed(3)
    defaults = {"num_condition_tokens": 1, "own_embeddings": False, "codebook_size": CODEBOOK_SIZE, "grid_size": GRID}
    drafter = EagleDrafter(dim=32, num_heads=2, ffn_dim=48, **{**defaults, **config})
    for weight in drafter.parameters():
        nn.init.normal_(weight, std=0.2)
    return drafter.eval()


@pytest.mark.parametrize("own", [True, False])
def test_drafters_survive_a_folder(tmp_path, own):
    drafter = small(own_embeddings=own)
    drafter.save_pretrained(tmp_path)
    again = EagleDrafter.from_pretrained(tmp_path)
    backbone = tiny_backbone()
    hidden, codes = torch.randn(2, 5, 32), torch.randint(CODEBOOK_SIZE, (2, 5))
    assert torch.equal(again(hidden, again.embed(codes, backbone)), drafter(hidden, drafter.embed(codes, backbone)))


def test_original_files_load_from_a_path(tmp_path):
    drafter = small(own_embeddings=True)
    save_file(drafter.state_dict(), tmp_path / "model.safetensors")
    loaded = EagleDrafter.from_original(
        tmp_path / "model.safetensors", grid_size=GRID, num_heads=2, num_condition_tokens=1
    )
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), drafter.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda w: w.pop("fc.weight"), {}, "lacks fc.weight"),
        (lambda w: w.pop("layers.0.self_attn.k_proj.weight"), {}, "missing .*k_proj"),
        (lambda w: w.update(extra=torch.zeros(1)), {}, "unexpected key: extra"),
        (
            lambda w: w.update({"layers.0.self_attn.o_proj.weight": torch.zeros(2, 2)}),
            {},
            r"o_proj.weight is \(2, 2\) in the file",
        ),
        (lambda w: w.update({"layers.0.self_attn.q_norm.weight": torch.zeros(2)}), {}, "Chameleon"),
        (lambda w: None, {"grid_size": None}, "give grid_size"),
        (lambda w: None, {"num_heads": None}, "give num_heads"),
    ],
    ids=["no fc", "key missing", "key extra", "wrong shape", "other family", "no grid", "no heads"],
)
def test_files_that_do_not_fit_are_refused_in_one_line(change, config, message):
    weights = dict(small(own_embeddings=True).state_dict())
    change(weights)
    config = {"grid_size": GRID, "num_heads": 2, "num_condition_tokens": 1, **config}
    with pytest.raises(ValueError, match=message) as error:
        EagleDrafter.from_original(weights, **{key: value for key, value in config.items() if value is not None})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [({"grid_size": (4, 5)}, "was made for a backbone of"), ({"num_condition_tokens": 3}, "condition positions")],
)
def test_a_drafter_of_another_backbone_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        LanternSampler(relaxation="none").sample(
            tiny_backbone(), torch.zeros(1).long(), seeds=[0], drafter=small(**config)
        )


# ----------------------------------------------------------------------------------------------------------- hand-off


class Recorded(LanternSampler):
    """Looks at both caches after every pass."""

    def step(self, state):
        state = WindowSampler.step(self, state)
        if not state.done and state.width > 1:  # nothing is drafted for the last slot
            self.look(state)
        return state


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [{"tree": "naive_extend_57"}, {"guidance_scale": 2.0}, {"tree": "dynamic", "depth": 5}], ids=str
)
def test_both_caches_hold_what_a_plain_pass_over_the_codes_gives(settings):
    backbone, drafter, tokenizer = tiny_backbone(), small(), tiny_tokenizer()
    seen = []

    def look(self, state):
        run, branches = state.drafter.model, state.session.branches
        for place, image in enumerate(state.rows.tolist()):
            length = int(state.length[place])
            codes = state.tokens[image, :length][None]
            labels = torch.tensor([image, backbone.config.num_classes][:branches])
            _, hidden = backbone(codes.expand(branches, -1), labels, hidden=True)
            pairs = int(run.lengths[place])
            assert pairs == length  # one condition position: a pair for every permanent code
            features = drafter(hidden, backbone.embed(codes).expand(branches, -1, -1))
            torch.testing.assert_close(run.features[:, place, 0], features[:, -1], rtol=0, atol=1e-4)
            fresh, _ = backbone.open(
                backbone.prepare(labels[:1], guidance_scale=self.guidance_scale), max_window=length
            )
            backbone.step(fresh, codes[:, :-1]) if length > 1 else None
            rows = [place + branch * len(state.rows) for branch in range(branches)]
            for layer in range(len(backbone.layers)):
                held = state.session.cache.keys[layer][rows, :, :length]
                torch.testing.assert_close(held, fresh.cache.keys[layer][:, :, :length], rtol=0, atol=1e-4)
            seen.append(length)

    recorded = type("RecordedHere", (Recorded,), {"look": look})
    sampler = recorded(relaxation="lantern++", k=4, **settings)
    sampler.sample(backbone, torch.arange(3), seeds=range(3), drafter=drafter, tokenizer=tokenizer)
    assert len(seen) > 6


@torch.no_grad()
def test_nodes_are_read_as_if_their_path_were_permanent():
    """A tree read level by level gives each node the logits of a chain along its path."""
    backbone, drafter = tiny_backbone(), small()
    hidden = torch.randn(1, 2, 3, 32, generator=torch.Generator().manual_seed(0))
    codes = torch.tensor([[5, 9, 2], [7, 1, 1]])
    num = torch.tensor([3, 2])  # ragged

    def opened_here():
        session = drafter.open_drafts(backbone, branches=1, batch=2, max_nodes=12)
        return session, session.extend(codes, hidden, num)

    session, _ = opened_here()
    first = session.expand(torch.tensor([[3, 4], [3, 4]]), torch.tensor([[-1, -1], [-1, -1]]))
    second = session.expand(torch.tensor([[8, 8, 6], [8, 8, 6]]), torch.tensor([[0, 1, 1], [0, 1, 1]]))
    for path, logits in (
        ([3], first[:, :, 0]),
        ([4], first[:, :, 1]),
        ([3, 8], second[:, :, 0]),
        ([4, 6], second[:, :, 2]),
    ):
        alone, _ = opened_here()
        for i, code in enumerate(path):
            out = alone.expand(torch.full((2, 1), code), torch.full((2, 1), i - 1))
        torch.testing.assert_close(out[:, :, 0], logits, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- distribution


@pytest.mark.parametrize("tree", ["chain", "mc_sim_7b_63", "dynamic"])
def test_greedy_is_greedy(tree):
    backbone, drafter = tiny_backbone(), small()
    labels = torch.arange(5)
    settings = {"temperature": 0.0, "guidance_scale": 2.0}
    expected = NextTokenSampler(**settings).sample(backbone, labels, seeds=range(5)).codes
    found = LanternSampler(relaxation="none", tree=tree, **settings).sample(
        backbone, labels, seeds=range(5), drafter=drafter
    )
    assert torch.equal(found.codes, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"tree": "mc_sim_7b_63"}, {"tree": "dynamic", "branching": 2, "num_nodes": 8}], ids=str
)
def test_samples_with_random_drafters_follow_the_law_of_the_backbone(settings):
    backbone = tiny_backbone(codebook_size=3, num_classes=2, class_dropout_prob=0.1)
    object.__setattr__(backbone, "grid_size", (1, 4))
    backbone._rope._made.clear()
    drafter = small(codebook_size=3, grid_size=(1, 4))
    sampler = LanternSampler(relaxation="none", guidance_scale=1.5, **settings)

    @torch.no_grad()
    def distribution(prefix):
        codes = torch.tensor([[*prefix, 0]]).expand(2, -1)
        logits = backbone(codes, torch.tensor([1, 2]))[:, -1][:, None, None]
        return warp_logits(logits, guidance_scale=1.5)[0, 0].softmax(-1).tolist()

    labels = torch.ones(4_000, dtype=torch.int64)
    codes = sampler.sample(backbone, labels, seeds=range(4_000), drafter=drafter).codes
    p = chi_square_p(codes, sequence_law(distribution, 4))
    assert p > 1e-4, f"p = {p:.2g}"


def test_metadata_names_the_sources():
    with safe_open(GOLDEN / "lantern" / "drafter.safetensors", "pt") as file:
        assert "LANTERN" in file.metadata()["repository"]
        assert json.loads(file.metadata()["total_tokens"]) == 59
