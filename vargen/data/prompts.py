"""Captions of heroes, and the way back: free text to attribute ids.

The phrase table holds every part's name and aliases (`atlas.json`). A generic word means one representative part
("sword" the long sword, "hat" the wizard hat, "dwarf" the deep dwarf); the aliases say which.
"""

# s slots

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vargen.data.atlas import UNSPECIFIED, HeroAtlas

# words that take no article: plurals and materials
_NO_ARTICLE = frozenset(
    ["armour", "boots", "bracers", "claws", "gauntlets", "gloves", "hair", "hide", "horns", "leggings", "mail"]
    + ["pigtails", "plate", "sandals", "shoes", "shorts", "skin", "trousers"]
)
_FILLERS = frozenset(
    [
        "a",
        "an",
        "the",
        "some",
        "any",
        "his",
        "her",
        "its",
        "their",
        "with",
        "and",
        "or",
        "nor",
        "in",
        "of",
        "on",
        "who",
    ]
    + ["wearing", "wears", "wear", "holding", "holds", "hold", "carrying", "carries", "has", "having", "plus", "armed"]
    + ["dressed", "hero", "heroine", "character", "portrait", "picture", "image", "sprite", "pixel", "art"]
)
_SUBJECTS = frozenset({"hero", "heroine", "character"})  # enough for a prompt that asks for anybody
_NEGATIONS = frozenset({"no", "without", "lacking", "minus", "not"})
_KEEP_NEGATION = frozenset(["a", "an", "the", "any", "wearing", "holding", "carrying", "having"])
_SPELLINGS = {
    "armor": "armour", "gray": "grey", "gold": "golden", "blonde": "blond", "violet": "purple", "crimson": "red",
    "scarlet": "red", "turquoise": "cyan", "teal": "cyan", "aqua": "cyan", "mage": "wizard", "sorcerer": "wizard",
    "cape": "cloak", "mantle": "cloak", "pant": "trouser", "pants": "trousers", "helm": "helmet", "saber": "sabre",
    "mustache": "moustache", "ax": "axe", "jeweled": "jewelled", "checked": "checkered", "chequered": "checkered",
    "hauberk": "mail", "stave": "staff", "redheaded": "red hair", "greatsword": "great sword",
    "longsword": "long sword", "shortsword": "short sword", "battleaxe": "battle axe", "waraxe": "war axe",
    "handaxe": "hand axe", "pickaxe": "pick axe", "warhammer": "war hammer", "chainmail": "chain mail",
    "scalemail": "scale mail", "platemail": "plate mail", "morningstar": "morning star", "longbow": "long bow",
    "spellbook": "spell book",
}  # fmt: skip


@dataclass(frozen=True)
class _Phrases:
    ids: dict[tuple[str, ...], int]  # normalised words -> part id or none id
    longest: int
    spoken: dict[str, int] = field(repr=False)  # as written, for suggestions


def caption(attributes: ArrayLike) -> str:
    """Describe a hero in words; unspecified slots and empty slots are not mentioned.

    Args:
        attributes: (s,) integers.

    Returns:
        For example "a deep elf with a wizard hat, a red cloak and a great sword".

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
    if not worn:
        return subject
    listing = worn[0] if len(worn) == 1 else f"{', '.join(worn[:-1])} and {worn[-1]}"
    return f"{subject} with {listing}"


def parse_prompt(text: str) -> NDArray[np.int64]:
    """Read a free-text prompt.

    The longest known phrase wins at each place; case, punctuation, plural or singular, British or American spelling
    and small words do not matter. "no hat", "without a beard or gloves", "bald" or "unarmed" ask for an empty slot.

    Args:
        text: for example "deep elf, red cloak, great sword, no hat".

    Returns:
        (s,) ids; 0 for slots that the text does not mention.

    Raises:
        ValueError: empty text, unknown words (the nearest known phrases are named), two parts for one slot.
    """
    atlas, phrases = HeroAtlas.load(), _phrases()
    words = _words(text)
    if not words:
        raise ValueError("the prompt is empty; describe a hero, for example 'deep elf with a red cloak'")
    found: dict[int, tuple[int, str]] = {}  # slot -> id, words
    unknown: list[str] = []
    negated = after_negated = anybody = False
    position = 0
    while position < len(words):
        length, attribute = _longest_match(words, position, phrases)
        if length:
            spoken = " ".join(words[position : position + length])
            slot = int(atlas.slot_of[attribute])
            if negated:
                attribute, spoken = atlas.none_id(atlas.slots[slot]), f"no {spoken}"
            earlier = found.setdefault(slot, (attribute, spoken))
            if earlier[0] != attribute:
                raise ValueError(
                    f"two parts for one place ({atlas.slots[slot]}): {earlier[1]!r} and {spoken!r}; name only one"
                )
            negated, after_negated = False, negated
            position += length
            continue
        word = words[position]
        position += 1
        if word in _NEGATIONS or (after_negated and word in ("or", "nor")):
            negated = True  # "no hat or beard" negates both
        elif word in _FILLERS or word == ",":
            negated = negated and word in _KEEP_NEGATION
            anybody = anybody or word in _SUBJECTS
        else:
            unknown.append(word)
            negated = False
        after_negated = after_negated and word in ("or", "nor", ",")
    if unknown:
        raise ValueError(_unknown_message(unknown, words, phrases))
    if not found and not anybody:
        raise ValueError(f"the prompt {text.strip()!r} names no part of a hero; try 'deep elf with a red cloak'")
    attributes = np.full(len(atlas.slots), UNSPECIFIED, dtype=np.int64)
    for slot, (attribute, _) in found.items():
        attributes[slot] = attribute
    return attributes


def _is_part(attribute: int) -> bool:
    return int(attribute) != UNSPECIFIED and int(attribute) not in HeroAtlas.load().record["none_ids"].values()


def _with_article(name: str) -> str:
    if name.split()[-1] in _NO_ARTICLE:
        return name
    vowel = name[0] in "aeiou" and not name.startswith("uni")  # a unicorn shield
    return f"{'an' if vowel else 'a'} {name}"


def _words(text: str) -> list[str]:
    """Split into normalised words; a comma, semicolon, colon or full stop becomes one ','."""
    plain = re.sub(r"['\u2019]s?\b", "", text.lower())
    tokens = re.findall(r"[^\W_]+|[,;:.!?]", plain)
    words: list[str] = []
    for token in tokens:
        if not token[0].isalnum():
            words.append(",")
            continue
        for word in _SPELLINGS.get(token, token).split():
            singular = _singular(word)
            words.extend(_SPELLINGS.get(singular, singular).split())
    return words if any(word != "," for word in words) else []


def _singular(word: str) -> str:
    if word in _FILLERS or word in _NEGATIONS or len(word) <= 3 or not word.endswith("s") or word.endswith("ss"):
        return word
    return "hoof" if word == "hooves" else word[:-1]


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
        key = tuple(_words(phrase))
        if ids.setdefault(key, attribute) != attribute:
            raise ValueError(f"atlas.json: the phrase {phrase!r} stands for two parts")
    return _Phrases(ids, max(map(len, ids)), spoken)


def _longest_match(words: list[str], position: int, phrases: _Phrases) -> tuple[int, int]:
    for length in range(min(phrases.longest, len(words) - position), 0, -1):
        attribute = phrases.ids.get(tuple(words[position : position + length]))
        if attribute is not None:
            return length, attribute
    return 0, UNSPECIFIED


def _unknown_message(unknown: list[str], words: list[str], phrases: _Phrases) -> str:
    near: list[str] = []
    for word in unknown:
        after = words[words.index(word) + 1 : words.index(word) + 2]
        tries = [" ".join([word, *after]), word] if after and after[0] not in _FILLERS | {","} else [word]
        for phrase in tries:
            near += difflib.get_close_matches(phrase, phrases.spoken, n=3, cutoff=0.6)
    hint = f"; nearest known: {', '.join(repr(n) for n in dict.fromkeys(near))}" if near else ""
    plural = "s" if len(unknown) > 1 else ""
    return f"unknown word{plural} in the prompt: {', '.join(map(repr, dict.fromkeys(unknown)))}{hint}"
