"""Mistakes that the tests must notice: each is one change of the library's text and the test that has to fail under it.

``tests/test_mutants.py`` makes each in a copy of the tree. Where code moves, the text here moves with it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """``old`` stands once in ``file`` and becomes ``new``; ``test`` is what fails then."""

    name: str
    file: str
    old: str
    new: str
    test: str


NOISE = "tests/test_noise.py::test_a_number_serves_one_purpose"
USED = "tests/test_noise.py::test_what_is_read_decides_something"
LAW = "tests/test_continuous_speculative.py::test_what_replaces_a_draft_does_not_know_the_uniform_that_refused_it"
FORCED = "tests/test_window.py::test_forced_codes_stay_with_their_image_when_others_leave"

MUTANTS = (
    Mutant(
        "the code behind a tree is drawn with the noise of the siblings",
        "samplers/acceptance/tree.py",
        "positions=rows.positions.gather(1, last), stream=Stream.RESIDUAL)",
        "positions=rows.positions.gather(1, last))",
        NOISE,
    ),
    Mutant(
        "forced codes stay behind when images leave",
        "samplers/window/decoder.py",
        "state.forced = None if state.forced is None else state.forced[keep]",
        "state.forced = state.forced",
        FORCED,
    ),
    Mutant(
        "the threshold of top-p is squared where sure codes are not drawn",
        "samplers/heads/categorical.py",
        "math.log(self.top_p)",
        "math.log(self.top_p**2)",
        "tests/test_nar.py::test_a_code_is_sure_only_if_it_holds_the_whole_mass_of_top_p",
    ),
    Mutant(
        "all steps of a chain share the noise of their residuals",
        "samplers/acceptance/gaussian_chains.py",
        "number = numbers * num_steps + k",
        "number = numbers",
        NOISE,
    ),
    Mutant(
        "the uniform of an acceptance comes back in the residual",
        "samplers/acceptance/gaussian_chains.py",
        "sampler.inside(state, where), 1, Stream.FRESH, numbers)",
        "sampler.inside(state, where), 1, Stream.ACCEPT, numbers)",
        NOISE,
    ),
    Mutant(
        "the uniform of an acceptance is kept for the residual",
        "samplers/acceptance/gaussian_chains.py",
        "survive(ratio, v[:, 0, 0])",
        "survive(ratio, u[rows, count.clamp(max=num - 1)[rows]])",
        USED,
    ),
    Mutant(
        "the uniform of an acceptance is kept for the residual: its law",
        "samplers/acceptance/gaussian_chains.py",
        "survive(ratio, v[:, 0, 0])",
        "survive(ratio, u[rows, count.clamp(max=num - 1)[rows]])",
        LAW,
    ),
    Mutant(
        "top-p of the mass before top-k",
        "kernels/warp.py",
        "kept, -1, keepdim=True\n",
        "z, -1, keepdim=True\n",
        "tests/test_warp.py::test_top_p_is_a_share_of_what_top_k_left",
    ),
    Mutant(
        "top-p of the mass before top-k, in the kernel",
        "kernels/device.py",
        "total += tl.sum(tl.where(x >= tau, tl.exp(x - peak), 0.0), 0)",
        "total += tl.sum(tl.exp(x - peak), 0)",
        "tests/test_warp.py::test_top_p_is_a_share_of_what_top_k_left",
    ),
)
