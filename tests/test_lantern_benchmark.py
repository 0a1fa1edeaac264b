"""The LANTERN benchmark: what it compares, and what it makes of the numbers."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def lantern(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import lantern

    return lantern


def test_every_method_scores_the_same_number_of_codes_a_forward(lantern):
    found = lantern.samplers({"top_k": 9})
    rows = {sampler.num_rows for label, (_, sampler) in found.items() if label != "next token"}
    assert rows == {lantern.DEPTH + 1}
    assert {curve for curve, _ in found.values()} == {"next token", "exact", "LANTERN", "LANTERN++", "GSD"}
    assert next(iter(found)) == "next token"  # the times are ratios to it
    assert all(sampler.top_k == 9 for _, sampler in found.values())


def test_costs_and_gains_are_those_against_the_exact_chain(lantern):
    rows = [
        {"curve": "exact", "setting": "exact", "codes/forward": 2.0, "FD": 5.0},
        {"curve": "LANTERN", "setting": "LANTERN δ=0.1", "codes/forward": 3.0, "FD": 5.5},
        {"curve": "LANTERN", "setting": "LANTERN δ=0.05", "codes/forward": 2.5, "FD": 5.25},
    ]
    found = lantern.with_cost(rows, "FD")
    assert [(row["cost"], row["gain"]) for row in found] == [(0.0, 1.0), (0.5, 1.5), (0.25, 1.25)]
    panels = lantern.panels_of({"heroes": found, "protocol": {"num": 512}})
    axis = lantern.plot(panels).axes[0]
    lines = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axis.lines}
    assert lines["LANTERN"] == [(2.5, 0.25), (3.0, 0.5)]  # by strength
    assert lantern.with_cost([{"curve": "GSD", "FD": 1.0}], "FD") == [
        {"curve": "GSD", "FD": 1.0}
    ]  # nothing to compare
