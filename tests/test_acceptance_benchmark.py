"""The acceptance benchmark compares like with like, and the GPU scripts say so where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import acceptance_kernel

    return acceptance_kernel


def test_eager_baseline_commits_as_much_as_the_kernels(benchmark):
    """Same work, other random numbers: the mean count of committed codes agrees."""
    ours, eager = [], []
    for seed in range(30):
        step = benchmark.Step(256, 8, 64, "cpu", torch.float32, seed)
        outcome = benchmark.verify_window(step.logits, step.draft, carry="maximal", **step.where, **step.settings)
        ours.append(outcome.num_committed.double())
        eager.append(step.eager()[0].double())
    ours, eager = torch.cat(ours), torch.cat(eager)
    error = ((ours.var() + eager.var()) / len(ours)).sqrt()
    assert (ours.mean() - eager.mean()).abs() < 4 * error
    assert 1.5 < ours.mean() < 6  # drafts pass and fail


def test_laws_of_the_baseline_are_those_of_the_kernels(benchmark):
    step = benchmark.Step(256, 2, 3, "cpu", torch.bfloat16, 0)
    from vargen.kernels.warp import warp_logits

    law = warp_logits(step.logits, **step.settings).softmax(-1)
    assert torch.allclose(benchmark._probabilities(step.logits, step.top_k), law, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says nothing where there is a GPU")
@pytest.mark.parametrize("script", ["gpu.py", "acceptance_kernel.py", "decode_gpu.py"])
def test_scripts_say_that_there_is_no_gpu(script):
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert run.stderr.startswith("no CUDA device here")
    assert len(run.stderr.splitlines()) == 1
