"""Replayed iterations: the same codes from fixed buffers, and nothing that a CUDA graph could not record.

A stand-in for the graph runs the captured function again at every replay, over the same buffers. What a real capture
would refuse, reading a value back or a shape that depends on values, raises on fake CUDA tensors.
"""

from dataclasses import fields, is_dataclass

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import Parameter

from tests.tiny import CODEBOOK_SIZE, tiny_backbone
from vargen.kernels.draw import new_errors
from vargen.samplers.window import cuda_graph as graphs
from vargen.samplers.window.draft_model import DraftModelSampler
from vargen.samplers.window.grouped import GroupedSpeculativeSampler
from vargen.samplers.window.jacobi import SpeculativeJacobiSampler
from vargen.samplers.window.next_token import NextTokenSampler

SAMPLERS = [
    NextTokenSampler(guidance_scale=2.0, top_k=20),
    NextTokenSampler(temperature=0),
    SpeculativeJacobiSampler(window=4, guidance_scale=2.0, top_k=20),
    SpeculativeJacobiSampler(window=3, carry="maximal", init="repeat_above", top_p=0.9),
    SpeculativeJacobiSampler(window=3, carry="independent", init="repeat_left"),
    SpeculativeJacobiSampler(window=5, temperature=0),
    GroupedSpeculativeSampler(window=4, top_k=20, distance_threshold=None),
]
LABELS, SEEDS = torch.tensor([1, 2, 3]), [7, 8, 2**64 - 1]


def tensors_of(value, found=None):
    """All tensors inside a state, by path; what the graph must find again at its address."""
    found = {} if found is None else found
    for name, item in list(items_of(value)):
        if isinstance(item, torch.Tensor):
            found[id(value), name] = item
        elif item is not None and (is_dataclass(item) or type(item).__name__ in ("WindowSession", "KVCache", "list")):
            tensors_of(item, found)
    return found


def items_of(value):
    if isinstance(value, list):
        return enumerate(value)
    return ((f.name, getattr(value, f.name)) for f in fields(value)) if is_dataclass(value) else vars(value).items()


@pytest.fixture
def stand_in(monkeypatch):
    """A CPU that takes graphs: what is captured runs at every replay, and every buffer must stay where it was."""
    captured = []

    def capture(run, device):
        captured.append(run)
        return run

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr("vargen.samplers.window.decoder.obstacle", lambda sampler, backbone: None)
    monkeypatch.setattr("vargen.samplers.window.decoder.looking_is_free", lambda device: False)
    return captured


@pytest.mark.parametrize("forced", [None, 5], ids=["free", "forced"])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_replays_give_the_same_codes_from_the_same_buffers(sampler, forced, stand_in):
    backbone = tiny_backbone()
    given = {} if forced is None else {"forced_codes": torch.tensor([-1, forced, *[-1] * 12, forced, -1])}
    plain = sampler.sample(backbone, LABELS, seeds=SEEDS, cuda_graph=False, **given)
    assert not stand_in
    addresses = []

    def look(step, state):
        if step > graphs.WARM_UP:
            addresses.append({name: tensor.data_ptr() for name, tensor in tensors_of(state).items()})

    out = sampler.sample(backbone, LABELS, seeds=SEEDS, cuda_graph=True, callback=look, **given)
    assert torch.equal(out.codes, plain.codes)
    assert torch.equal(out.stats.commit_trace, plain.stats.commit_trace)
    assert torch.equal(out.stats.forwards_per_image, plain.stats.forwards_per_image)
    assert len(stand_in) == 1
    assert out.stats.extra["graph_replays"] == out.stats.num_forwards - 1 - graphs.WARM_UP > 0
    assert all(there == addresses[0] for there in addresses)
    assert len(addresses[0]) > 12  # state, draft, stream, session, both caches


def fake_state(sampler, mode):
    """A state behind its prefill whose tensors, weights included, are fake ones on a CUDA device."""

    def fake(tensor):
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")

    def convert(value):
        for name, item in list(items_of(value)):
            if isinstance(item, torch.Tensor):
                value.__setitem__(name, fake(item)) if isinstance(value, list) else put(value, name, fake(item))
            elif type(item).__name__ in ("WindowSession", "KVCache", "list", "Draft", "SlotLayout", "JacobiDrafter"):
                convert(item)

    put = object.__setattr__  # drafts are frozen
    backbone = tiny_backbone()
    state = sampler.start(backbone, LABELS, seeds=SEEDS, cuda_graph=True)
    state.errors = new_errors(len(SEEDS))  # as on a CUDA device
    convert(state)
    backbone._rope._made = {torch.device("cuda", 0): (fake(backbone.rope_table()),)}
    for module in backbone.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, Parameter(fake(weight), requires_grad=False))
    return state


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_an_iteration_reads_nothing_back(sampler, stand_in):
    pytest.importorskip("triton")  # without it CUDA tensors go to the references, which look at values
    mode = FakeTensorMode()
    state = fake_state(sampler, mode)
    before = {name: id(tensor) for name, tensor in tensors_of(state).items()}
    with mode:
        state.replay.iterate(sampler, state)
        state.replay.iterate(sampler, state)
        assert state.tokens.device.type == "cuda"
    after = {name: id(tensor) for name, tensor in tensors_of(state).items()}
    assert {name: after[name] for name in before} == before


def test_reading_back_is_seen(stand_in):
    """The test above can fail: without a record of bad rows every draw asks the device whether its rows were good."""
    mode = FakeTensorMode()
    for sampler in (SAMPLERS[0], SAMPLERS[2]):
        state = fake_state(sampler, mode)
        state.errors = None
        with mode, pytest.raises(DataDependentOutputException):
            state.replay.iterate(sampler, state)


def test_a_capture_that_fails_is_told_and_changes_no_code(stand_in, monkeypatch):
    def refuse(run, device):
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    sampler, backbone = SAMPLERS[2], tiny_backbone()
    plain = sampler.sample(backbone, LABELS, seeds=SEEDS, cuda_graph=False)
    monkeypatch.setattr(graphs, "capture", refuse)
    out = sampler.sample(backbone, LABELS, seeds=SEEDS)
    assert torch.equal(out.codes, plain.codes)
    assert out.stats.extra["graph_replays"] == 0
    assert out.stats.notes == [
        "iterations are not replayed as a CUDA graph: operation not permitted when stream is capturing"
    ]


def test_on_the_cpu_nothing_is_replayed_and_asking_for_it_is_refused():
    backbone = tiny_backbone()
    out = SAMPLERS[0].sample(backbone, LABELS, seeds=SEEDS)
    assert "graph_replays" not in out.stats.extra
    assert out.stats.notes == []
    with pytest.raises(ValueError, match="cuda_graph=True is not possible: the backbone is on cpu"):
        SAMPLERS[0].sample(backbone, LABELS, seeds=SEEDS, cuda_graph=True)


def test_obstacles_are_named(monkeypatch):
    class OnDevice:
        device, features = torch.device("cuda"), frozenset({"window", "ragged"})

    assert "DraftModelSampler have no fixed shapes" in graphs.obstacle(DraftModelSampler(), OnDevice())
    assert "OnDevice opens no sessions of fixed shapes" in graphs.obstacle(SAMPLERS[0], OnDevice())


@pytest.mark.gpu
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_a_real_graph_gives_the_codes_of_plain_iterations(sampler):
    backbone = tiny_backbone().to("cuda")
    plain = sampler.sample(backbone, LABELS.cuda(), seeds=SEEDS, cuda_graph=False)
    out = sampler.sample(backbone, LABELS.cuda(), seeds=SEEDS, cuda_graph=True)
    assert out.stats.extra["graph_replays"] > 0
    assert (out.codes != plain.codes).float().mean() < 0.1  # attention over the whole buffer rounds differently
    assert int(out.codes.max()) < CODEBOOK_SIZE
