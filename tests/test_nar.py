"""NAR: official keys, every golden number, the distribution of the diagonals, images that depend on their seed only."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.enumeration import chi_square_p
from tests.golden_files import load_file, unpacked
from tests.recording_head import SEEN, RecordingHead
from tests.tiny import CODEBOOK_SIZE, tiny_pipeline, tiny_tokenizer
from vargen.backbones.nar.model import NARTransformer
from vargen.checkpoints.manifests.published import PARAMETERS
from vargen.checkpoints.reader import CheckpointError
from vargen.checkpoints.verify import verify_checkpoint
from vargen.kernels.draw import draw
from vargen.kernels.warp import warp_logits
from vargen.samplers.heads.categorical import CategoricalHead
from vargen.samplers.schedule.neighboring import NeighboringSampler
from vargen.samplers.schedule.schedule import DecodeSchedule
from vargen.samplers.window.next_token import NextTokenSampler

GOLDEN = Path(__file__).parent / "golden" / "nar"
SETS = ("c2i", "t2i", "video")
HEADS = {"c2i": ("right", "below"), "t2i": ("right", "below"), "video": ("right", "down", "back")}
RUNS = ("gen_cfg1", "gen_cfg", "gen_cfg_interval")


class Golden:
    def __init__(self, name):
        self.config = json.loads((GOLDEN / name / "config.json").read_text())
        self.io = load_file(GOLDEN / name / "io.safetensors")
        grid = self.config.get("latent_shape") or [self.config["grid"]] * 2
        heads = self.config["model_args"]["n_head"]
        self.path = unpacked(GOLDEN / name / "model.safetensors")
        self.model = NARTransformer.from_original(self.path, grid_size=grid, num_heads=heads)
        features = ("cond/caption_embs", "cond/emb_masks")
        self.condition = tuple(self.io[key] for key in features) if name == "t2i" else self.io["cond/class_ids"]

    def settings(self, run):
        scale = 1.0 if run == "gen_cfg1" else self.config["cfg_scale"]
        return {"guidance_scale": scale, "guidance_interval": self.config["cfg_interval"] if "interval" in run else -1}


@pytest.fixture(scope="module", params=SETS)
def case(request):
    return request.param, Golden(request.param)


def tiny(**config):
    """A model whose every weight matters."""
    torch.manual_seed(1)
    defaults = {"dim": 32, "num_layers": 2, "num_heads": 2, "grid_size": (4, 4), "num_classes": 10}
    model = NARTransformer(**{**defaults, "codebook_size": CODEBOOK_SIZE, "condition_rope": "identity", **config})
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    return model.eval()


@torch.no_grad()
def test_teacher_forced_logits_are_the_official_ones(case):
    name, golden = case
    io = golden.io
    parts = golden.model(io["tf/tokens"], golden.condition, parts=True)
    for head, word in enumerate(HEADS[name]):
        torch.testing.assert_close(parts[head], io[f"tf/logits_{word}_raw"], atol=1e-4, rtol=0)
    logits = golden.model(io["tf/tokens"], golden.condition)
    torch.testing.assert_close(logits, io["tf/logits_mixed"], atol=1e-4, rtol=0)
    loss = F.cross_entropy(logits.flatten(0, 1), io["tf/tokens"].flatten())
    torch.testing.assert_close(loss, io["tf/loss"][0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("run", RUNS)
def test_greedy_runs_are_the_official_ones_token_for_token(case, run):
    name, golden = case
    if f"{run}/tokens" not in golden.io:
        assert (name, run) == ("t2i", "gen_cfg_interval")
        return
    io = {key.removeprefix(f"{run}/"): value for key, value in golden.io.items() if key.startswith(run + "/")}
    sampler = RecordingSampler(temperature=0, **golden.settings(run))
    SEEN.clear()
    out = sampler.sample(golden.model, golden.condition, seeds=[0, 0])
    schedule = sampler.make_schedule(golden.model)
    assert torch.equal(out.codes, io["tokens"])
    assert torch.equal(schedule.order, io["step_pos"])
    assert torch.equal(out.codes[:, schedule.order], io["step_tokens"])
    assert schedule.group_sizes == tuple(io["step_sizes"].tolist())
    assert tuple(len(step.kinds) for step in schedule.steps) == tuple(io["input_sizes"].tolist())
    # official slots are raster positions behind the condition: what ours calls the index of an item
    fed = torch.cat([step.index + (step.kinds == 1) * schedule.num_condition for step in schedule.steps])
    assert torch.equal(fed, io["input_pos"])
    torch.testing.assert_close(torch.cat(SEEN, dim=1), io["step_logits"], atol=1e-4, rtol=0)


class RecordingSampler(NeighboringSampler):
    def make_head(self, errors):
        return RecordingHead(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


class TorchHead(CategoricalHead):
    """Draws with torch's generator as the official code does: one multinomial a position."""

    def draw(self, rows, keys, positions, guidance_scale):
        z = warp_logits(rows, **self.warp(guidance_scale))
        return torch.cat([torch.multinomial(p, 1) for p in z.softmax(-1).unbind(1)], dim=1)


class TorchSampler(NeighboringSampler):
    def make_head(self, errors):
        return TorchHead(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


def test_the_stochastic_run_filters_and_draws_in_the_official_order(case):
    name, golden = case
    given = golden.config["sampled"]
    if given is None:
        assert name == "t2i"
        return
    sampler = TorchSampler(
        temperature=given["temperature"],
        top_k=given["top_k"],
        top_p=given["top_p"],
        guidance_scale=golden.config["cfg_scale"],
    )
    torch.manual_seed(given["seed"])
    out = sampler.sample(golden.model, golden.condition, seeds=[0, 0])
    assert torch.equal(out.codes, golden.io["gen_sampled/tokens"])


@torch.no_grad()
def test_masks_and_rotations_are_the_official_ones(case):
    name, golden = case
    if name != "video":
        torch.testing.assert_close(golden.model.rope_table()[:-1], golden.io["rope/freqs_cis"], atol=1e-6, rtol=0)
    mask = golden.io["mask/diagonal" if name == "video" else "mask/proximity"]
    assert torch.equal(golden.model._order_tables(torch.device("cpu"))[0], mask.bool())


def test_published_sizes_have_their_exact_counts():
    with torch.device("meta"):
        for family, condition in (("nar", "class"), ("nar-t2i", "caption"), ("nar-video", "class")):
            for size, count in PARAMETERS[family].items():
                if condition == "class" or size in ("B", "XL"):
                    weights = NARTransformer.from_size(size, condition_type=condition).state_dict()
                    buffer = weights.get("cls_embedding.uncond_embedding", torch.empty(0)).numel()
                    assert sum(weight.numel() for weight in weights.values()) - buffer == count
                if (condition, size) in [("class", "abs-S"), ("caption", "B")]:
                    report = verify_checkpoint(weights)
                    assert (report.ok, report.size, report.num_parameters) == (True, size, count)
    # the measured numbers of nar_nbp.md a.1 and a.5, in millions
    assert [round(n / 1e6, 1) for n in PARAMETERS["nar"].values()] == [130.6, 295.5, 372.5, 816.0, 1464.5]
    assert [round(n / 1e6, 1) for n in PARAMETERS["nar-video"].values()] == [37.8, 125.1, 368.7, 693.6, 815.5]
    assert round(PARAMETERS["nar-t2i"]["XL"] / 1e6, 1) == 819.0
    with pytest.raises(ValueError, match="published sizes are B, L"):
        NARTransformer.from_size("huge")


def test_damaged_checkpoints_are_refused():
    weights = load_file(GOLDEN / "c2i" / "model.safetensors")
    with pytest.raises(ValueError, match="grid_size cannot be read off the shapes"):
        NARTransformer.from_original(weights, num_heads=4)
    with pytest.raises(ValueError, match="num_heads cannot be read off"):
        NARTransformer.from_original(weights, grid_size=(6, 6))
    del weights["medusa_norm.weight"]
    with pytest.raises(CheckpointError, match="missing key: medusa_norm"):
        NARTransformer.from_original(weights, grid_size=(6, 6), num_heads=4)
    video = load_file(GOLDEN / "video" / "model.safetensors")
    with pytest.raises(ValueError, match="of the file's 24 codes, got"):
        NARTransformer.from_original(video, grid_size=(2, 3, 5), num_heads=4)
    with pytest.raises(CheckpointError, match="looks like a LlamaGen"):
        NARTransformer.from_original(unpacked(GOLDEN.parent / "llamagen" / "gpt_c2i.safetensors"), grid_size=(4, 4))


@pytest.mark.parametrize("config", [{}, {"code_rank": 8}, {"grid_size": (2, 3, 4)}])
def test_saving_and_loading_changes_nothing(config, tmp_path):
    model = tiny(**config)
    model.save_pretrained(tmp_path)
    again = NARTransformer.from_pretrained(tmp_path)
    assert again.grid_size == model.grid_size
    labels = torch.tensor([1, 2])
    sampler = NeighboringSampler(guidance_scale=2.0)
    codes = sampler.sample(model, labels, seeds=[1, 2]).codes
    assert torch.equal(sampler.sample(again, labels, seeds=[1, 2]).codes, codes)


@pytest.mark.parametrize("config", [{}, {"code_rank": 8}, {"grid_size": (3, 5)}, {"grid_size": (2, 3, 4)}])
@torch.no_grad()
def test_decoding_reads_the_training_forward(config):
    """The logits of every step are those of the forward over the finished codes."""
    model, labels = tiny(**config), torch.tensor([1, 2])
    sampler = RecordingSampler(temperature=0)
    SEEN.clear()
    codes = sampler.sample(model, labels, seeds=[0, 0]).codes
    order = sampler.make_schedule(model).order
    torch.testing.assert_close(torch.cat(SEEN, dim=1), model(codes, labels)[:, order], atol=2e-4, rtol=0)


def test_the_law_is_the_product_of_the_diagonals():
    model = tiny(codebook_size=2, grid_size=(2, 2))
    for _, output in model.heads:
        getattr(model, output).weight.data *= 0.4
    sampler = NeighboringSampler(guidance_scale=1.5)
    every = torch.cartesian_prod(*[torch.arange(2)] * 4)
    with torch.no_grad():
        labels = torch.zeros(len(every), dtype=torch.int64)
        both = torch.stack([model(every, labels), model(every, labels + 10)])  # 10 = no class
    joint = warp_logits(both, guidance_scale=1.5).log_softmax(-1).gather(-1, every[..., None])[..., 0].sum(1).exp()
    expected = dict(zip(map(tuple, every.tolist()), joint.tolist(), strict=True))
    assert sum(expected.values()) == pytest.approx(1, abs=1e-5)
    labels = torch.zeros(3000, dtype=torch.int64)
    codes = sampler.sample(model, labels, seeds=range(3000)).codes
    p = chi_square_p(codes, expected)
    assert p > 1e-4, f"p = {p:.2g}; a right sampler fails once in 10,000 runs"
    wrong = sampler.replace(temperature=1.3).sample(model, labels, seeds=range(3000)).codes
    assert chi_square_p(wrong, expected) < 1e-4, "the test has no power"


def test_an_image_depends_on_its_seed_only():
    model, sampler = tiny(), NeighboringSampler(guidance_scale=2.0, top_k=16)
    labels, seeds = torch.tensor([3, 1, 4, 1, 5]), [9, 2**63 + 1, 3, 12, 5]
    together = sampler.sample(model, labels, seeds=seeds)
    assert together.stats.num_forwards == 7
    assert together.stats.guarantee == "exact"
    assert together.stats.forwards_per_image.tolist() == [7] * 5
    assert together.stats.commit_trace[0].view(4, 4).tolist() == [[r + c for c in range(4)] for r in range(4)]
    order = [3, 0, 4, 2, 1]
    again = sampler.sample(model, labels[order], seeds=[seeds[i] for i in order])
    assert torch.equal(again.codes, together.codes[order])
    for i, seed in enumerate(seeds):
        assert torch.equal(sampler.sample(model, labels[i : i + 1], seeds=[seed]).codes[0], together.codes[i])


@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"top_p": 0.6, "top_k": 5}, {"top_p": 0.5, "temperature": 0.3}])
def test_skipping_the_noise_of_sure_codes_changes_nothing(settings):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 8, 64) * torch.tensor([0.1, 1, 2, 4, 8, 16, 32, 64])[:, None]
    keys, positions = torch.tensor([1, 2, 3]), torch.arange(8).expand(3, -1)
    expected = draw(logits, seeds=keys, positions=positions, guidance_scale=1.5, **settings)
    assert torch.equal(CategoricalHead(**settings).draw(logits, keys, positions, 1.5), expected)


@pytest.mark.parametrize("top_p", [0.3, 0.6, 0.9])
def test_a_code_is_sure_only_if_it_holds_the_whole_mass_of_top_p(top_p):
    """Dies here: the threshold squared."""
    largest = torch.linspace(0.02, 0.98, 49)
    logits = torch.cat([largest[:, None], ((1 - largest) / 63)[:, None].expand(-1, 63)], dim=1).log()  # 49 64
    keys, positions = torch.arange(20), torch.arange(49).expand(20, -1)
    expected = draw(logits.expand(1, 20, -1, -1), seeds=keys, positions=positions, top_p=top_p)
    assert bool((expected[:, (largest > top_p**2) & (largest < top_p - 0.02)] > 0).any())  # rows that are not sure
    assert bool((expected[:, largest > top_p + 0.02] == 0).all())
    found = CategoricalHead(top_p=top_p).draw(logits.expand(1, 20, -1, -1), keys, positions, 1.0)
    assert torch.equal(found, expected)


def test_fixed_codes_stay_and_the_rest_follows_them():
    model, sampler, labels = tiny(), NeighboringSampler(), torch.tensor([1, 2])
    free = sampler.sample(model, labels, seeds=[5, 6]).codes
    fixed = torch.full((16,), -1)
    fixed[5] = (free[0, 5] + 1) % CODEBOOK_SIZE
    out = sampler.sample(model, labels, seeds=[5, 6], forced_codes=fixed)
    assert (out.codes[:, 5] == fixed[5]).all()
    before = torch.arange(16) // 4 + torch.arange(16) % 4 <= 2
    before[5] = False
    assert torch.equal(out.codes[:, before], free[:, before])  # earlier diagonals do not see it
    assert not torch.equal(out.codes[0, ~before], free[0, ~before])
    everything = sampler.sample(model, labels, seeds=[5, 6], forced_codes=free)
    assert torch.equal(everything.codes, free)


def test_what_does_not_fit_is_refused_in_one_line():
    model, labels = tiny(), torch.tensor([1])
    with pytest.raises(ValueError, match=r"NextTokenSampler needs .* Samplers that fit: NeighboringSampler$"):
        NextTokenSampler().sample(model, labels, seeds=[0])
    with pytest.raises(ValueError, match="not trained for the schedule 'raster'; schedules that fit: nar2d"):
        NeighboringSampler().sample(model, labels, seeds=[0], schedule=DecodeSchedule.raster((4, 4)))
    with pytest.raises(ValueError, match=r"for a grid of \(3, 3\) codes, the model for \(4, 4\)"):
        NeighboringSampler().sample(model, labels, seeds=[0], schedule=DecodeSchedule.nar2d((3, 3)))
    with pytest.raises(ValueError, match="has 2 condition positions, the model 1"):
        NeighboringSampler().sample(model, labels, seeds=[0], schedule=DecodeSchedule.nar2d((4, 4), 2))
    with pytest.raises(ValueError, match="schedule must be a DecodeSchedule or None, got tuple"):
        NeighboringSampler().sample(model, labels, seeds=[0], schedule=DecodeSchedule.nar2d((4, 4)).steps)
    with pytest.raises(ValueError, match="takes no input 'schedul'; did you mean 'schedule'"):
        NeighboringSampler().sample(model, labels, seeds=[0], schedul=DecodeSchedule.nar2d((4, 4)))
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        NeighboringSampler().sample(tiny().train(), labels, seeds=[0])
    with pytest.raises(ValueError, match=r"must be integers \[16\] or \[1, 16\]"):
        NeighboringSampler().sample(model, labels, seeds=[0], forced_codes=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"must lie in 0..63, or be -1"):
        NeighboringSampler().sample(model, labels, seeds=[0], forced_codes=torch.full((16,), 64))
    with pytest.raises(ValueError, match="guidance_schedule must be one of constant, linear"):
        NeighboringSampler(guidance_schedule="cosine")
    with pytest.raises(ValueError, match=r"codes must be \[batch, 16\]"):
        model(torch.zeros(1, 15, dtype=torch.int64), labels)
    with pytest.raises(ValueError, match=r"\(height, width\) or \(frames, height, width\)"):
        NARTransformer(grid_size=(4,))


def test_bad_logits_are_named():
    model = tiny()
    model.medusa_output.weight.data[0, 0] = float("nan")
    for sampler in (NeighboringSampler(), NeighboringSampler(top_p=0.9)):
        with pytest.raises(ValueError, match="logits of image 0 at position 0 are NaN"):
            sampler.sample(model, torch.tensor([1]), seeds=[0])


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}])
def test_bad_logits_are_named_by_the_kernels_too(settings, monkeypatch):
    """Kernels note bad rows in a record that is read at the end of the decode."""
    pytest.importorskip("triton")
    monkeypatch.setenv("VARGEN_KERNELS", "triton")
    model = tiny(grid_size=(2, 2))
    model.cls_embedding.embedding_table.weight.data[2] = float("nan")
    with pytest.raises(ValueError, match="logits of image 1 at position 0 are NaN"):
        NeighboringSampler(**settings).sample(model, torch.tensor([1, 2]), seeds=[0, 1])


def test_a_guidance_schedule_reaches_the_scale_at_the_end():
    sampler, schedule = (
        NeighboringSampler(guidance_scale=3.0, guidance_schedule="linear"),
        DecodeSchedule.nar2d((4, 4)),
    )
    assert sampler.guidance_at(schedule.steps[0], 16, 0) == 1.0
    assert sampler.guidance_at(schedule.steps[3], 16, 8) == 2.0
    assert NeighboringSampler(guidance_scale=3.0).guidance_at(schedule.steps[0], 16, 0) == 3.0


def test_a_pipeline_draws_by_diagonals_and_survives_its_folder(tmp_path):
    pipe = tiny_pipeline(backbone=tiny(), sampler=NeighboringSampler(guidance_scale=2.0), tokenizer=tiny_tokenizer())
    steps = []
    out = pipe(
        class_labels=[1, 2],
        seed=3,
        output_type="pt",
        callback_on_step_end=lambda pipe, step, forwards, tensors: steps.append(int((tensors["codes"] >= 0).sum())),
    )
    assert out.images.shape == (2, 3, 8, 8)
    assert steps == [2, 6, 12, 20, 26, 30, 32]
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.sampler) is NeighboringSampler
    assert torch.equal(again(class_labels=[1, 2], seed=3, output_type="codes").codes, out.codes)
    assert torch.equal(pipe(class_labels=[1, 2], seed=3, output_type="codes", batch_size=1).codes, out.codes)
    pipe.sampler = NextTokenSampler.from_config(pipe.sampler.config)
    with pytest.raises(ValueError, match="Samplers that fit: NeighboringSampler"):
        pipe(class_labels=[1], seed=0)
