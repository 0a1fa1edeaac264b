"""Captions of heroes, and the way back: free text to attribute ids.

The phrase table holds every part's name and aliases (`atlas.json`). A generic word means one representative part
("sword" the long sword, "hat" the wizard hat, "dwarf" the deep dwarf); the aliases say which.
"""

# s slots

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vargen.datasets.heroes.atlas import UNSPECIFIED, HeroAtlas
from vargen.datasets.nearest_words import NearestPhrases

# bounds of a prompt; of 20,000 captions with all eleven slots the longest has 192 characters and 35 words
MAX_CHARACTERS = 1000
MAX_WORDS = 100
# bounds of an error message
MAX_NAMED = 3  # unknown words that it names
MAX_SHOWN = 40  # characters of the prompt in one place

# words that take no article: plurals and materials
_NO_ARTICLE = frozenset({
    "armour", "boots", "bracers", "claws", "gauntlets", "gloves", "hair", "hide", "horns", "mail", "leggings",
    "pigtails", "plate", "sandals", "shoes", "shorts", "skin", "trousers",
})  # fmt: skip
_FILLERS = frozenset({
    "a", "an", "the", "some", "any", "one", "his", "her", "its", "their", "with", "and", "or", "nor", "in", "of", "on",
    "at", "to", "who", "is", "plus", "wearing", "wears", "wear", "holding", "holds", "hold", "carrying",
    "carries", "having", "has", "armed", "dressed", "wielding", "wields", "left", "right", "hand", "hands", "head",
    "feet", "portrait", "picture", "image", "sprite", "pixel", "art",
})  # fmt: skip
# say nothing about any slot ("orc warrior" is an orc), but are enough for a prompt that asks for anybody
_EMPTY = {"cloak": "no cloak", "hand2": "no shield"}  # slots whose emptiness has no word of its own
_SUBJECTS = frozenset({
    "hero", "heroine", "character", "adventurer", "archer", "assassin", "barbarian", "druid", "fighter", "guard",
    "hunter", "jester", "king", "knight", "monk", "necromancer", "ninja", "paladin", "pharaoh", "pirate", "priest",
    "priestess", "prince", "princess", "queen", "ranger", "rogue", "samurai", "soldier", "thief", "viking", "warrior",
    "witch", "wizard",
})  # fmt: skip
_TOKEN = re.compile(r"[^\W_]+")
_NEGATIONS = frozenset({"no", "without", "lacking", "minus", "not"})
_KEEP_NEGATION = frozenset({"a", "an", "the", "any", "wearing", "holding", "carrying", "having"})
_SPELLINGS = {
    "armor": "armour", "gray": "grey", "gold": "golden", "blonde": "blond", "violet": "purple", "crimson": "red",
    "scarlet": "red", "turquoise": "cyan", "teal": "cyan", "aqua": "cyan", "mage": "wizard", "sorcerer": "wizard",
    "cape": "cloak", "mantle": "cloak", "pant": "trouser", "helm": "helmet", "saber": "sabre", "ax": "axe",
    "mustache": "moustache", "jeweled": "jewelled", "checked": "checkered", "chequered": "checkered",
    "hauberk": "mail", "stave": "staff", "greatsword": "great sword", "longsword": "long sword",
    "shortsword": "short sword", "battleaxe": "battle axe", "waraxe": "war axe", "handaxe": "hand axe",
    "pickaxe": "pick axe", "warhammer": "war hammer", "chainmail": "chain mail", "scalemail": "scale mail",
    "platemail": "plate mail", "morningstar": "morning star", "longbow": "long bow", "spellbook": "spell book",
    # plurals that lose more than an s
    "scarve": "scarf", "elve": "elf", "dwarve": "dwarf", "knive": "knife", "torche": "torch", "dresse": "dress",
    "mummie": "mummy", "men": "man", "women": "woman", "cutlasse": "cutlass", "moustachio": "moustache",
}  # fmt: skip


@dataclass(frozen=True)
class _Phrases:
    ids: dict[tuple[str, ...], int]  # normalised words -> part id or none id
    longest: int
    spoken: NearestPhrases  # as written, for suggestions


class UnknownWordsError(ValueError):
    """A prompt holds words that say nothing about a hero: `words`, as they were written."""

    def __init__(self, message: str, words: list[str]) -> None:
        super().__init__(message)
        self.words = words


class NamesNothingError(ValueError):
    """A prompt holds known words only, but no part of a hero."""


def caption(attributes: ArrayLike, *, empty: bool = False) -> str:
    """Describe a hero in words; unspecified slots are not mentioned, and empty ones only if wanted.

    Args:
        attributes: (s,) integers.
        empty: also say which slots are empty, so that `parse_prompt` returns all attributes as they were.

    Returns:
        For example "a deep elf with a wizard hat, a red cloak and a great sword", and with ``empty`` perhaps
        ", bald, no shield".

    Raises:
        ValueError: wrong shape, or an id that does not belong to its slot.
    """
    atlas = HeroAtlas.load()
    ids = atlas.check(attributes)
    if ids.ndim != 1:
        raise ValueError(f"caption takes one hero, attributes ({len(atlas.slots)},), got {ids.shape}")
    parts = {slot: _with_article(atlas.part(i).name) for slot, i in zip(atlas.slots, ids, strict=True) if _is_part(i)}
    subject = parts.pop("base", "a hero")
    worn = [parts[slot] for slot in atlas.record["caption_order"] if slot in parts]
    text = subject
    if worn:
        listing = worn[0] if len(worn) == 1 else f"{', '.join(worn[:-1])} and {worn[-1]}"
        text = f"{subject} with {listing}"
    none_ids = atlas.record["none_ids"]
    bare = [slot for slot, i in zip(atlas.slots, ids, strict=True) if empty and int(i) == none_ids.get(slot)]
    return ", ".join([text, *(_EMPTY.get(slot) or atlas.record["bare"][slot][0] for slot in bare)])


def parse_prompt(text: str) -> NDArray[np.int64]:
    """Read a free-text prompt.

    The longest known phrase wins at each place; case, punctuation, plural or singular, British or American spelling
    and small words do not matter. "no hat", "without a beard or gloves", "bald" or "unarmed" ask for an empty slot.

    Args:
        text: for example "deep elf, red cloak, great sword, no hat".

    Returns:
        (s,) ids; 0 for slots that the text does not mention.

    Raises:
        ValueError: no text, empty text, more than 1000 characters or 100 words, unknown words (the nearest known phrases
            of the first three are named), two parts for one slot, a negation without a part or of the base.
    """
    check_text(text)
    return np.array(_parse(text), dtype=np.int64)


def check_text(text: Any) -> None:
    """Raise ``ValueError`` for a prompt that is no text, or longer than any hero takes to describe."""
    if not isinstance(text, str):
        raise ValueError(f"a prompt must be a text, got {type(text).__name__}")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"a prompt may have {MAX_CHARACTERS} characters, got {len(text)}; name the parts only")
    if (count := len(_TOKEN.findall(text))) > MAX_WORDS:
        raise ValueError(f"a prompt may have {MAX_WORDS} words, got {count}; name the parts only")


@lru_cache(maxsize=256)  # a web page reads a prompt before it waits for its turn, and again when it draws
def _parse(text: str) -> tuple[int, ...]:
    atlas = HeroAtlas.load()
    words, originals = _words(text)
    if not words:
        raise ValueError("the prompt is empty; describe a hero, for example 'deep elf with a red cloak'")
    mentions, unknown = _mentions(words)
    if unknown:
        raise _unknown_words(unknown, words, originals)
    attributes = np.full(len(atlas.slots), UNSPECIFIED, dtype=np.int64)
    spoken: dict[int, str] = {}
    for attribute, phrase in mentions:
        slot = int(atlas.slot_of[attribute])
        if attributes[slot] not in (UNSPECIFIED, attribute):
            raise ValueError(
                f"two parts for one place ({atlas.slots[slot]}): {spoken[slot]!r} and {phrase!r}; name only one"
            )
        attributes[slot], spoken[slot] = attribute, phrase
    if not mentions and not _SUBJECTS.intersection(words):
        shown = _cut(text.strip())
        raise NamesNothingError(f"the prompt {shown!r} names no part of a hero; try 'deep elf with a red cloak'")
    return tuple(attributes.tolist())


def _mentions(words: list[str]) -> tuple[list[tuple[int, str]], list[int]]:
    """Find (attribute id, phrase) in the order of the text, and the positions of unknown words."""
    atlas, phrases = HeroAtlas.load(), _phrases()
    mentions: list[tuple[int, str]] = []
    unknown: list[int] = []
    negated = after_negated = False
    position = 0
    while position < len(words):
        word = words[position]
        length, attribute = _longest_match(words, position, phrases)
        if length:
            phrase = " ".join(words[position : position + length])
            if negated:
                slot = atlas.slots[atlas.slot_of[attribute]]
                if slot == "base":  # every hero has one; a model never saw its none id
                    raise ValueError(f"'no {phrase}' cannot be asked for; say what the hero is instead")
                attribute, phrase = atlas.none_id(slot), f"no {phrase}"
            mentions.append((attribute, phrase))
            negated, after_negated = False, negated
        elif word in _NEGATIONS or (after_negated and word in ("or", "nor")):
            negated, after_negated = True, False  # "no hat or beard" negates both
        else:
            known = word in _FILLERS or word in _SUBJECTS or word == ","
            if not known:
                unknown.append(position)
            elif negated and word not in _KEEP_NEGATION:
                break
            after_negated = after_negated and word == ","
        position += max(length, 1)
    if negated and not unknown:
        raise ValueError("a negation in the prompt is not followed by a known part; write for example 'no hat'")
    return mentions, unknown


def _is_part(attribute: int) -> bool:
    return int(attribute) != UNSPECIFIED and int(attribute) not in HeroAtlas.load().record["none_ids"].values()


def _with_article(name: str) -> str:
    if name.split()[-1] in _NO_ARTICLE:
        return name
    vowel = name[0] in "aeiou" and not name.startswith("uni")  # a unicorn shield
    return f"{'an' if vowel else 'a'} {name}"


def _words(text: str) -> tuple[list[str], list[str]]:
    """Split into normalised words, with the word of the text that each came from; punctuation becomes ','."""
    words: list[str] = []
    originals: list[str] = []
    for token in re.findall(r"[^\W_]+|[,;:.!?]", re.sub(r"['\u2019]s?\b", "", text.lower())):
        normal = [","]
        if token[0].isalnum():
            singulars = [_singular(word) for word in _SPELLINGS.get(token, token).split()]
            normal = " ".join(_SPELLINGS.get(word, word) for word in singulars).split()
        words += normal
        originals += [token] * len(normal)
    return (words, originals) if any(word != "," for word in words) else ([], [])


def _singular(word: str) -> str:
    if word in _FILLERS or word in _NEGATIONS or len(word) <= 3 or not word.endswith("s") or word.endswith("ss"):
        return word
    return word[:-1]


@lru_cache(maxsize=1)
def _phrases() -> _Phrases:
    atlas = HeroAtlas.load()
    spoken: dict[str, int] = {}
    for part in atlas.parts:
        for phrase in (part.name, *part.aliases):
            spoken[phrase] = part.id
    for slot, phrases in atlas.record["bare"].items():
        for phrase in phrases:
            spoken[phrase] = atlas.none_id(slot)
    ids: dict[tuple[str, ...], int] = {}
    for phrase, attribute in spoken.items():
        key = tuple(_words(phrase)[0])
        if ids.setdefault(key, attribute) != attribute:
            raise ValueError(f"atlas.json: the phrase {phrase!r} stands for two parts")
    return _Phrases(ids, max(map(len, ids)), NearestPhrases(spoken))


def _longest_match(words: list[str], position: int, phrases: _Phrases) -> tuple[int, int]:
    for length in range(min(phrases.longest, len(words) - position), 0, -1):
        attribute = phrases.ids.get(tuple(words[position : position + length]))
        if attribute is not None:
            return length, attribute
    return 0, UNSPECIFIED


def _unknown_words(unknown: list[int], words: list[str], originals: list[str]) -> UnknownWordsError:
    first: dict[str, int] = {}  # word as it was written -> its first place
    for position in unknown:
        first.setdefault(originals[position], position)
    named = list(first)[:MAX_NAMED]
    searched: list[str] = []
    for position in (first[word] for word in named):
        after = words[position + 1] if position + 1 < len(words) else ","
        whole = [f"{words[position]} {after}"] if after != "," and after not in _FILLERS else []
        searched += [*whole, words[position]]  # "yellow hat": phrases like the pair, then like the word
    near = dict.fromkeys(phrase for found in _phrases().spoken.search(searched) for phrase in found)
    hint = f"; nearest known: {', '.join(map(repr, list(near)[: 3 * MAX_NAMED]))}" if near else ""
    more = f" and {len(first) - len(named)} more" if len(first) > len(named) else ""
    listed = ", ".join(repr(_cut(word)) for word in named) + more
    return UnknownWordsError(f"unknown word{'s' * (len(first) > 1)} in the prompt: {listed}{hint}", list(first))


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
