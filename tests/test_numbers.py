"""Every number in README and docs stands in a recording, and a changed digit is noticed (``docs/measured.py``)."""

from __future__ import annotations

import pytest

from docs import measured

PAGES = measured.pages()


@pytest.mark.parametrize("page", PAGES)
def test_numbers_are_those_of_the_recordings(page: str) -> None:
    assert measured.faults(page, PAGES[page]) == []


@pytest.mark.parametrize("page", ["README.md", "docs/samplers.md"])
def test_one_wrong_digit_is_found(page: str) -> None:
    text, pending = PAGES[page], measured.entries()[2].get(page, [])
    left_out = [measured.section(text, heading) for heading in pending]
    checked = 0
    for start, _, number in measured.looks_measured(text):
        if any(first <= start < last for first, last in left_out):
            continue
        wrong = str((int(number[0]) + 1) % 10)
        assert measured.faults(page, text[:start] + wrong + text[start + 1 :]), f"{number} may be anything"
        checked += 1
    assert checked > 10


def test_a_new_measurement_needs_a_source() -> None:
    for words in ("It is 3.2 times as fast.", "It takes 14 seconds.", "41 % of them", "a 7x gain", "in 12 passes"):
        found = measured.faults("README.md", PAGES["README.md"] + words)
        assert len(found) == 1
        assert "nothing says where" in found[0]
    for words in ("two parts of 260", "`sleep 1.5`", "[a page](v1.5.md)", "float32 of 32 x 32 pixels", "heroes32-var"):
        assert measured.faults("README.md", PAGES["README.md"] + words) == []


def test_writing_mends_numbers_and_tables() -> None:
    page = "README.md"
    start, _, _ = next(place for place in measured.looks_measured(PAGES[page]) if place[2] == "15")
    wrong = (PAGES[page][:start] + "3" + PAGES[page][start + 1 :]).replace("(floor ", "(floor 9", 1)
    assert len(measured.faults(page, wrong)) == 2
    assert measured.corrected(page, wrong) == PAGES[page]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("speculative-synthetic.json: rows[batch=1].forwards", "picks"),
        ("heroes32-var/README.md ~ no such ([\\d.]+)", "has no"),
    ],
)
def test_sources_that_are_not_there(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measured.value(source)
