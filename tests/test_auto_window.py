"""Windows whose width changes: the codes of next-token sampling whatever is chosen, and widths that a run can repeat."""

import dataclasses
import json

import pytest
import torch

import vargen
from tests.test_jacobi import tiny_llamagen, zeros
from tests.tiny import tiny_pipeline
from tests.toys import SpatialBackbone, perturbed
from vargen.samplers.base import Sampler
from vargen.samplers.window import widths as widths_module
from vargen.samplers.window.controller import AutoController, ByAge, ByDepth, Iteration, Situation
from vargen.samplers.window.fixed import chosen_window, fixed_width

SEEDS = [7, 8, 9, 2**64 - 1]
SETTINGS = [{}, {"guidance_scale": 2.0, "top_k": 20}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 0}]


class Cycle:
    """A controller that goes through some widths."""

    def __init__(self, *widths: int) -> None:
        self.widths, self.asked, self.told = widths, [], []

    def choose(self, situation: Situation) -> int:
        self.asked.append(situation)
        return self.widths[(len(self.asked) - 1) % len(self.widths)]

    def observe(self, iteration: Iteration) -> None:
        self.told.append(iteration)


def jacobi(window, **settings):
    return vargen.SpeculativeJacobiSampler(window=window, **settings)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s) or "plain")
@pytest.mark.parametrize(
    ("window", "init"),
    [
        ((1, 7, 1, 1, 3), "uniform"),
        ((5, 2, 64), "repeat_left"),
        ((1,), "uniform"),
        ("auto", "uniform"),
        ("auto", "repeat_above"),
    ],
    ids=str,
)
def test_codes_do_not_depend_on_widths(window, init, settings):
    backbone = SpatialBackbone(32, (4, 5))
    expected = vargen.NextTokenSampler(**settings).sample(backbone, zeros(4), seeds=SEEDS).codes
    chosen = window if window == "auto" else Cycle(*window)
    out = jacobi(chosen, init=init, **settings).sample(backbone, zeros(4), seeds=SEEDS)
    assert torch.equal(out.codes, expected)
    assert len(out.stats.widths) == out.stats.num_forwards - 1
    assert out.stats.guarantee == "exact"
    again = jacobi(out.stats.widths, init=init, **settings).sample(backbone, zeros(4), seeds=SEEDS)
    assert again.stats.widths == out.stats.widths
    assert torch.equal(again.stats.commit_trace, out.stats.commit_trace)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("window", ["auto", (1, 6, 1, 3, 3)])
def test_on_a_transformer_with_a_key_value_cache(window, batch):
    model, settings = tiny_llamagen(), {"guidance_scale": 2.5, "top_k": 30}
    labels, seeds = torch.arange(4)[:batch], list(range(batch))
    expected = vargen.NextTokenSampler(**settings).sample(model, labels, seeds=seeds).codes
    chosen = window if window == "auto" else Cycle(*window)
    assert torch.equal(jacobi(chosen, **settings).sample(model, labels, seeds=seeds).codes, expected)


def test_forced_codes_stay():
    backbone, forced = SpatialBackbone(16, (4, 5)), torch.full((20,), -1)
    forced[[0, 3, 4, 11]] = torch.tensor([5, 1, 2, 9])
    expected = vargen.NextTokenSampler().sample(backbone, zeros(4), seeds=SEEDS, forced_codes=forced).codes
    out = jacobi(Cycle(1, 4, 1, 9)).sample(backbone, zeros(4), seeds=SEEDS, forced_codes=forced)
    assert torch.equal(out.codes, expected)
    assert out.codes[:, 11].tolist() == [9] * 4


@pytest.mark.parametrize("drafter", ["row-above", "chain"])
@pytest.mark.parametrize("number", ["auto", (0, 0, 3, 0, 5, 1), (3, 40), (0,)], ids=str)
def test_chains_of_drafters_take_widths_too(drafter, number):
    backbone = SpatialBackbone(32, (5, 6))
    drafter = perturbed(backbone, 0.4) if drafter == "chain" else drafter
    expected = vargen.NextTokenSampler().sample(backbone, zeros(4), seeds=SEEDS).codes
    chosen = number if number == "auto" else Cycle(*(n + 1 for n in number))
    sampler = vargen.SpeculativeSampler(num_draft_tokens=chosen)
    out = sampler.sample(backbone, zeros(4), seeds=SEEDS, drafter=drafter)
    assert torch.equal(out.codes, expected)
    drafts = [width - 1 for width in out.stats.widths]
    again = sampler.replace(num_draft_tokens=drafts).sample(backbone, zeros(4), seeds=SEEDS, drafter=drafter)
    assert again.stats.widths == out.stats.widths
    assert torch.equal(again.stats.commit_trace, out.stats.commit_trace)


def test_a_drafter_rests_while_windows_are_one_and_catches_up():
    backbone = SpatialBackbone(32, (5, 6))
    same = SpatialBackbone(32, (5, 6))  # drafts what the target would draw
    chosen = Cycle(*[1] * 9, 5)
    out = vargen.SpeculativeSampler(num_draft_tokens=chosen).sample(backbone, zeros(2), seeds=[1, 2], drafter=same)
    assert out.stats.widths[9] == 5
    commits = torch.bincount(out.stats.commit_trace[0]).tolist()
    assert commits[:11] == [1] * 10 + [5]  # all drafts are right although the drafter had not seen nine codes
    assert out.stats.num_drafter_forwards < out.stats.num_forwards


def test_a_controller_sees_the_run():
    chosen = Cycle(1, 4)
    out = jacobi(chosen).sample(SpatialBackbone(64, (4, 6)), zeros(4), seeds=SEEDS)
    first = chosen.asked[0]
    assert (first.num_images, first.most_left, first.device, first.widths[0]) == (4, 23, "cpu", 1)
    assert [told.width for told in chosen.told] == out.stats.widths
    assert all(told.seconds > 0 and told.num_iterations == 1 for told in chosen.told)
    assert sum(sum(told.tested) for told in chosen.told) > 0
    assert all(r <= t for told in chosen.told for r, t in zip(told.right, told.tested, strict=True))
    committed = sum(told.width for told in chosen.told if told.width == 1)
    assert committed < 23  # wide ones did the rest


def test_time_between_steps_is_not_counted():
    import time

    chosen = Cycle(2)
    jacobi(chosen).sample(SpatialBackbone(8, (2, 3)), zeros(1), seeds=[1], callback=lambda *_: time.sleep(0.05))
    assert min(told.seconds for told in chosen.told) < 0.05


def drive(controller, cost, accept, steps=1000):
    """Run a controller on a machine of its own, seconds by rows, whose guesses are right so often: codes a second."""
    width, codes, seconds = 1, 0.0, 0.0
    for step in range(steps):
        width = controller.choose(Situation((1, 2, 4, 8, 16, 32, 64), width, 4, 1000, "cpu"))
        run = [100 * accept**depth for depth in range(width)]
        kinds = [0] * (64 - width + 1)
        controller.observe(Iteration(width, 4, cost(4 * width), 1, run[:-1] + kinds, run[1:] + kinds))
        if step >= steps // 4:
            codes, seconds = codes + sum(run) / 100, seconds + cost(4 * width)
    return codes / seconds


@pytest.mark.parametrize(
    ("cost", "accept", "best"),
    [
        (lambda rows: 1e-3 * rows, 0.5, 1),  # rows cost what they bring
        (lambda rows: 1e-3 * rows, 0.9, 1),
        (lambda rows: 1e-3, 0.95, 64),  # rows are free
        (lambda rows: 1e-3 * (64 + rows), 0.8, 8),
        (lambda rows: 1e-5 * (16 + rows) ** 1.5, 0.8, 4),
        (lambda rows: 1e-3 if rows <= 128 else 1.0, 0.9, 32),  # a cliff
    ],
)
def test_the_controller_finds_the_best_width_of_any_machine(cost, accept, best):
    def speed(width):
        return sum(accept**depth for depth in range(width)) / cost(4 * width)

    assert best == max((1, 2, 4, 8, 16, 32, 64), key=speed)
    assert drive(AutoController(ByDepth()), cost, accept) > 0.95 * speed(best)


def test_acceptance_by_age_foresees_what_widths_commit():
    backbone, seen = SpatialBackbone(64, (8, 8)), {}
    for width in (4, 16):
        chosen, model = Cycle(width), ByAge()
        jacobi(chosen).sample(backbone, zeros(16), seeds=range(16))
        for told in chosen.told:
            model.observe(dataclasses.replace(told, num_iterations=0))  # nothing fades
            if model.settling < 0:  # a window that fills is not counted
                model.passes[told.width] += told.num_images
        seen[width] = model.committed[width] / model.passes[width], model
    for width, (committed, model) in seen.items():
        assert model.expected([width])[0] == pytest.approx(committed, rel=0.1), width
    assert seen[16][1].expected([4])[0] == pytest.approx(seen[4][0], rel=0.25)  # one width tells about another


def test_memory_bounds_the_width(monkeypatch):
    backbone = SpatialBackbone(64, (8, 8))
    expected = vargen.NextTokenSampler().sample(backbone, zeros(4), seeds=SEEDS).codes
    for free, most in ((10**12, 64), (200_000, 9), (0, 1)):
        monkeypatch.setattr(widths_module, "free_memory", lambda device, free=free: free)
        chosen = Cycle(64)
        out = jacobi(chosen).sample(backbone, zeros(4), seeds=SEEDS)
        assert max(out.stats.widths) <= most
        assert max(chosen.asked[0].widths) <= most
        assert torch.equal(out.codes, expected)


def test_windows_of_one_score_the_rows_of_next_token_sampling():
    rows = []
    for sampler in (vargen.NextTokenSampler(), jacobi(Cycle(1))):
        backbone = SpatialBackbone(16, (4, 4))
        backbone.num_rows = 0
        sampler.sample(backbone, zeros(3), seeds=[1, 2, 3])
        rows.append((backbone.num_forwards, backbone.num_rows))
    assert rows[0] == rows[1]


def test_configurations_hold_words_and_lists_and_no_objects(tmp_path):
    listed = jacobi([3, 4, 60])
    assert listed.window == (3, 4, 60)
    text = json.dumps(dict(listed.config))
    assert Sampler.from_config(json.loads(text)) == listed
    assert jacobi("auto").config["window"] == "auto"
    chosen = Cycle(2)
    owner = jacobi(chosen)
    assert owner.config["window"] == "auto"
    assert owner.replace(top_k=3).window is chosen
    owner.save_pretrained(tmp_path)
    assert vargen.SpeculativeJacobiSampler.from_pretrained(tmp_path).window == "auto"
    grouped = vargen.GroupedSpeculativeSampler.from_config(jacobi("auto", top_k=5).config)
    assert (grouped.window, grouped.top_k) == (16, 5)


def test_habit_auto_and_lists_in_a_pipeline_call():
    pipe = tiny_pipeline()
    exact = pipe(class_labels=[1, 0], seed=3, output_type="codes").codes
    pipe.sampler = vargen.SpeculativeJacobiSampler.from_config(pipe.sampler.config, window="auto")
    out = pipe(class_labels=[1, 0], seed=3, output_type="codes")
    again = pipe(class_labels=[1, 0], seed=3, output_type="codes", window=out.stats.widths)
    assert torch.equal(out.codes, exact)
    assert torch.equal(again.codes, exact)
    assert again.stats.widths == out.stats.widths


def test_half_precision_says_what_the_clock_costs():
    model = tiny_llamagen().bfloat16()
    out = jacobi("auto").sample(model, torch.arange(2), seeds=[1, 2])
    assert any("stats.widths" in note for note in out.stats.notes)
    again = jacobi(out.stats.widths).sample(model, torch.arange(2), seeds=[1, 2])
    assert torch.equal(again.codes, out.codes)
    assert not again.stats.notes


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: jacobi("wide"), "window must be an integer at least 1, 'auto', or a list"),
        (lambda: jacobi([3, 0]), r"window\[1\] must be an integer at least 1, got 0"),
        (lambda: jacobi([]), "must hold 1"),
        (lambda: jacobi(0), "window must be an integer at least 1, got 0"),
        (lambda: jacobi(2.5), "window must be an integer at least 1"),
        (lambda: jacobi("auto", rule="maximal"), "needs rule='shared-noise'.*got rule='maximal'"),
        (lambda: jacobi([3], rule="independent"), "needs rule='shared-noise'"),
        (lambda: vargen.SpeculativeSampler(num_draft_tokens="auto", rule="rejection"), "needs rule='shared-noise'"),
        (lambda: vargen.SpeculativeSampler(num_draft_tokens="auto", tree="siblings"), "must be a number for trees"),
        (
            lambda: vargen.SpeculativeSampler(num_draft_tokens="many"),
            "num_draft_tokens must be an integer at least 0, 'auto'",
        ),
    ],
)
def test_bad_settings_are_one_line(make, words):
    with pytest.raises(ValueError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_bad_calls_are_one_line():
    backbone = SpatialBackbone(16, (4, 4))
    with pytest.raises(ValueError, match=r"must sum to at least 15.*got 2 widths that sum to 7") as caught:
        jacobi([3, 4]).sample(backbone, zeros(1), seeds=[1])
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="cuda_graph=True is not possible: widths change"):
        jacobi("auto").sample(backbone, zeros(1), seeds=[1], cuda_graph=True)
    with pytest.raises(ValueError, match="the width that the controller chose must be an integer at least 1, got 0"):
        jacobi(Cycle(0)).sample(backbone, zeros(1), seeds=[1])
    masked = tiny_pipeline().backbone
    masked.features = frozenset()
    with pytest.raises(ValueError, match="SpeculativeJacobiSampler needs a backbone with"):
        jacobi("auto").sample(masked, zeros(1), seeds=[1])


def test_what_a_run_learned_serves_the_next_one():
    """Costs and acceptance are remembered by backbone and number of branches, and forgotten with it."""
    backbone = SpatialBackbone(32, (4, 4))
    first = AutoController(known=backbone, kind=1)
    first.choose(Situation((1, 2, 4), 1, 1, 100, "cpu"))
    for width in (1, 1, 2, 2, 4, 4):
        first.observe(Iteration(width, 1, 2.0 if width == 1 else 0.5, 1, [4], [4]))
    again, other = AutoController(known=backbone, kind=1), AutoController(known=backbone, kind=2)
    assert again.choose(Situation((1, 2, 4), 1, 1, 100, "cpu")) == 4
    assert again.costs is first.costs
    other.choose(Situation((1, 2, 4), 1, 1, 100, "cpu"))
    assert other.costs is not first.costs
    assert AutoController(known=[]).known is None  # cannot be remembered


def test_the_first_window_of_several_images_must_promise_more():
    """Images that differ in length make every later pass dearer, so a small promise is not enough."""
    costs = {1: 1.0, 2: 1.0}
    for promise, chosen in ((1.1, 1), (1.4, 2)):
        controller = AutoController(ByDepth())
        controller.acceptance.prior[:] = promise - 1.0
        controller.choose(Situation((1, 2), 1, 8, 100, "cpu"))
        for _ in range(3):
            controller.observe(Iteration(1, 8, costs[1], 1, [0], [0]))
        controller.costs.excess[2, 8, True].append(
            controller.costs._correction(1, 8, False) - controller.costs._prior(2, 8) + controller.costs._prior(1, 8)
        )
        for _ in range(20):
            controller.observe(Iteration(1, 8, costs[1], 1, [0], [0]))
        assert controller.choose(Situation((1, 2), 1, 8, 100, "cpu")) == chosen


# ------------------------------------------------------------------------------------- the width where nothing is said


class Half(SpatialBackbone):
    """The flat model, said to be in half precision."""

    dtype = torch.bfloat16


@pytest.mark.parametrize(("images", "width"), [(1, 16), (2, 16), (3, 8), (4, 8), (5, 1), (64, 1)])
def test_half_precision_takes_widths_from_the_table(images, width):
    """Two runs with one seed agree: the width follows from device and images alone."""
    assert fixed_width("cpu", images) == width
    if images > 5:
        return
    out = vargen.SpeculativeJacobiSampler().sample(Half(16, (4, 5)), zeros(images), seeds=range(images))
    assert max(out.stats.widths) == width
    assert any(f"window={width}, from the table for bfloat16" in note for note in out.stats.notes)


def test_elsewhere_the_clock_chooses():
    backbone = SpatialBackbone(16, (4, 5))
    expected = vargen.NextTokenSampler().sample(backbone, zeros(3), seeds=range(3)).codes
    out = vargen.SpeculativeJacobiSampler().sample(backbone, zeros(3), seeds=range(3))
    assert torch.equal(out.codes, expected)
    assert "window='auto': codes do not depend on the width" in out.stats.notes
    again = vargen.SpeculativeJacobiSampler(window=out.stats.widths).sample(backbone, zeros(3), seeds=range(3))
    assert again.stats.widths == out.stats.widths
    for rule in ("maximal", "independent"):
        out = vargen.SpeculativeJacobiSampler(rule=rule).sample(backbone, zeros(3), seeds=range(3))
        same = vargen.SpeculativeJacobiSampler(rule=rule, window=32).sample(backbone, zeros(3), seeds=range(3))
        assert torch.equal(out.codes, same.codes)


def test_a_gpu_replays_one_width():
    class OnGPU(SpatialBackbone):
        device = torch.device("cuda")

    assert chosen_window("shared-noise", False, OnGPU(), 4)[0] == 32
    assert chosen_window("shared-noise", False, OnGPU(), 1000)[0] == 1
    assert chosen_window("shared-noise", True, OnGPU(), 4)[0] == "auto"


def test_pipelines_of_causal_models_begin_with_it():
    pipe = vargen.ImagePipeline.from_pretrained("heroes32-llamagen")
    assert isinstance(pipe.sampler, vargen.SpeculativeJacobiSampler)
    assert pipe.sampler.window is None
    out = pipe("minotaur", seed=0)
    plain = pipe("minotaur", seed=0, window=1)
    assert torch.equal(out.codes, plain.codes)
    assert out.stats.num_forwards < 0.5 * plain.stats.num_forwards
