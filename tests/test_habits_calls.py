"""Pipelines and models are copied, pickled, sent to workers and called by two threads like any other Python object."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import threading
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from tests.test_leaves import CASES
from tests.test_video import tiny_video_pipeline
from tests.tiny import tiny_hero_pipeline, tiny_pipeline, tiny_scale_pipeline

PIPELINES = {
    "classes": (tiny_pipeline, {"class_labels": 3}),
    "heroes": (tiny_hero_pipeline, {"prompt": "minotaur"}),
    "scales": (tiny_scale_pipeline, {"class_labels": 3}),
    "video": (tiny_video_pipeline, {"class_labels": 3}),
}
ROUNDS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
}


@pytest.fixture
def default_dtype():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


def codes_of(pipe, **arguments):
    codes = pipe(**arguments, seed=5, output_type="codes").codes
    return torch.cat(codes, dim=1) if isinstance(codes, list) else codes


@pytest.mark.parametrize("again", ROUNDS)
@pytest.mark.parametrize("name", PIPELINES)
def test_habit_copies_of_a_pipeline_draw_the_same(name: str, again: str) -> None:
    build, arguments = PIPELINES[name]
    pipe = build()
    other = ROUNDS[again](pipe)
    other.set_progress_bar_config(disable=True)
    assert other.backbone is not pipe.backbone
    assert torch.equal(codes_of(other, **arguments), codes_of(pipe, **arguments))


@pytest.mark.parametrize("name", CASES)
def test_habit_copies_of_a_model_draw_the_same_under_any_default_dtype(name: str, default_dtype) -> None:
    family = CASES[name]
    model = family.build()
    with torch.no_grad():
        expected = family.run(model)
        for again in ROUNDS.values():
            other = again(model)
            assert {id(weight) for weight in other.parameters()}.isdisjoint(map(id, model.parameters()))
        default_dtype(torch.float64)
        assert torch.equal(family.run(other), expected)


def _in_worker(pipe, arguments):
    return codes_of(pipe, **arguments).tolist()


@pytest.mark.slow
def test_habit_a_worker_process_draws_the_same() -> None:
    pipe, arguments = tiny_hero_pipeline(), {"prompt": "minotaur"}
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(_in_worker, pipe, arguments).result() == codes_of(pipe, **arguments).tolist()


def test_habit_what_a_callback_does_to_its_tensors_changes_no_picture() -> None:
    for build, arguments in PIPELINES.values():
        pipe = build()

        def wipe(pipe, step, num_forwards, tensors):
            for tensor in tensors.values():
                tensor.zero_()

        given = {"callback_on_step_end": wipe, "callback_on_step_end_tensor_inputs": ["codes", "num_committed"]}
        assert torch.equal(codes_of(pipe, **arguments, **given), codes_of(pipe, **arguments))


def test_habit_an_interrupt_in_a_callback_stops_its_own_call_only() -> None:
    """Two threads call one pipeline; the callback of one interrupts while the other is in the middle of its work."""
    pipe, found = tiny_pipeline(), {}
    both, stopped = threading.Barrier(2), threading.Event()

    def stops(pipe, step, num_forwards, tensors):
        if step == 2:
            both.wait(60)
            pipe._interrupt = True
            assert pipe.interrupt

    def goes_on(pipe, step, num_forwards, tensors):
        if step == 2:
            both.wait(60)
            assert stopped.wait(60)
            assert not pipe.interrupt

    def call(name, callback):
        found[name] = codes_of(pipe, class_labels=3, callback_on_step_end=callback)
        stopped.set()

    threads = [threading.Thread(target=call, args=pair) for pair in (("stops", stops), ("goes on", goes_on))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert int((found["stops"] >= 0).sum()) == 3
    assert torch.equal(found["goes on"], codes_of(pipe, class_labels=3))


def test_habit_another_thread_stops_what_runs_and_nothing_later() -> None:
    pipe, found = tiny_pipeline(), {}
    running, go = threading.Event(), threading.Event()

    def wait(pipe, step, num_forwards, tensors):
        running.set()
        assert go.wait(60)

    thread = threading.Thread(
        target=lambda: found.update(codes=codes_of(pipe, class_labels=3, callback_on_step_end=wait))
    )
    thread.start()
    assert running.wait(60)
    pipe._interrupt = True
    go.set()
    thread.join(120)
    assert int((found["codes"] >= 0).sum()) == 1
    assert not pipe.interrupt
    pipe._interrupt = True  # nobody listens
    assert bool((codes_of(pipe, class_labels=3) >= 0).all())
