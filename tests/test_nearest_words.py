"""Nearest phrases of unknown words: difflib's own answer with a bounded number of comparisons, in short messages."""

from __future__ import annotations

import difflib
import random

import pytest

from vargen.datasets import nearest_words
from vargen.datasets.heroes import prompts
from vargen.datasets.motion import prompts as motion_prompts
from vargen.datasets.nearest_words import NearestPhrases

LETTERS = "abcdefghijklmnopqrstuvwxyz "


def misspelled(phrase: str, rng: random.Random) -> str:
    letters = list(phrase)
    for _ in range(rng.randint(0, 4)):
        letters[rng.randrange(len(letters))] = rng.choice(LETTERS) * rng.randint(0, 2)
    return "".join(letters)


def test_the_answer_is_that_of_difflib() -> None:
    rng = random.Random(0)
    phrases = prompts._phrases().spoken.phrases
    words = [misspelled(rng.choice(phrases), rng) for _ in range(60)]
    words += ["".join(rng.choices(LETTERS, k=rng.randint(1, 20))) for _ in range(20)] + ["", "\u732b", "z" * 900]
    for cutoff in (0.6, 0.8):
        expected = [difflib.get_close_matches(word, phrases, n=3, cutoff=cutoff) for word in words]
        assert NearestPhrases(phrases).search(words, cutoff=cutoff) == expected
    assert NearestPhrases(phrases).search([]) == []


class Counted(difflib.SequenceMatcher):
    ratios = 0

    def ratio(self) -> float:
        Counted.ratios += 1
        return super().ratio()


@pytest.mark.parametrize("parse", [prompts.parse_prompt, motion_prompts.parse_prompt])
def test_many_unknown_words_cost_as_much_as_three(parse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest_words, "SequenceMatcher", Counted)
    Counted.ratios = 0
    with pytest.raises(ValueError, match="and 94 more; nearest known: '") as error:
        parse("purpel axx hatt " + " ".join(f"clok{i}" for i in range(94)))
    assert 0 < Counted.ratios <= 2 * 2 * prompts.MAX_NAMED * nearest_words.MAX_COMPARED
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("parse", [prompts.parse_prompt, motion_prompts.parse_prompt])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("elf " * 101, "a prompt may have 100 words, got 101"),
        ("," * 1001, "a prompt may have 1000 characters, got 1001"),
        ("\u732b jumping", "unknown word"),
        ("7 elf", "unknown word in the prompt: '7'"),
        ("q" * 900, r"unknown word in the prompt: 'q{37}\.\.\.'"),
        ("with " * 99, r"the prompt '(with ){7}wi\.\.\.' names no part"),
        (b"elf", "a prompt must be a text, got bytes"),
    ],
)
def test_prompts_are_bounded(parse, text, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parse(text)
    assert len(str(error.value)) < 300


def test_what_a_prompt_means_is_kept_but_not_shared() -> None:
    first = prompts.parse_prompt("orc with a red cloak")
    first[:] = -1
    assert (prompts.parse_prompt("orc with a red cloak") >= 0).all()
