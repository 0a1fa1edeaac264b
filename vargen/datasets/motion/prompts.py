"""Words of moving heroes: the parts and motions that clips are made of, captions, and the way back.

Hero words are read by `vargen.datasets.heroes.prompts`; what is added here are the motions, and the check that the named parts are
among those that the clips show.
"""

# s slots (11 of a hero, then the motion)

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vargen.datasets.heroes import prompts
from vargen.datasets.heroes.atlas import UNSPECIFIED, HeroAtlas
from vargen.datasets.nearest_words import NearestPhrases

MOTIONS = (
    "walking left",
    "walking right",
    "jumping",
    "shivering",
    "rising from the ground",
    "fading away",
    "standing still",
)
PARTS = {  # slot -> names; slots that are not here stay empty
    "cloak": ("blue cloak", "purple cloak", "red cloak"),
    "base": ("human", "deep elf", "merfolk", "minotaur", "mummy", "orc", "troll"),
    "body": ("blue robe", "red robe", "plate armour", "leather armour"),
    "head": ("golden crown", "plumed helmet", "pumpkin head", "red wizard hat", "viking helmet", "wizard hat"),
    "hand1": ("battle axe", "flaming sword", "great sword", "wooden staff"),
    "hand2": ("golden tower shield", "round shield", "red kite shield"),
}
_VERBS = {  # words that may stand before or after another for the same motion
    "walking left": ("walk left", "move left", "go left", "run left", "stroll left", "march left"),
    "walking right": ("walk right", "move right", "go right", "run right", "stroll right", "march right"),
    "jumping": ("jump", "jump up", "jump up and down", "hop", "leap", "bounce"),
    "shivering": ("shiver", "shake", "tremble", "wobble", "vibrate"),
    "rising from the ground": (
        "rise from the ground",
        "rise",
        "rise up",
        "come out of the ground",
        "emerge",
        "emerge from the ground",
    ),
    "fading away": ("fade away", "fade", "fade out", "disappear", "vanish"),
    "standing still": ("stand still", "stand", "idle", "do nothing", "wait", "motionless", "still"),
}
_FORMS = {  # inflected word -> stem, where cutting the ending is not enough
    "running": "run", "hopping": "hop", "coming": "come", "comes": "come", "goes": "go",
    "moving": "move", "bouncing": "bounce", "shaking": "shake", "trembling": "tremble",
    "wobbling": "wobble", "vibrating": "vibrate", "rising": "rise", "emerging": "emerge", "fading": "fade",
    "doing": "do", "does": "do", "idling": "idle", "marches": "march", "vanishes": "vanish", "leaps": "leap",
}  # fmt: skip
_BETWEEN = frozenset({"to", "the", "towards", "toward", "is", "who", "that"})


def motion_id(name: str) -> int:
    """Return the attribute id of a motion by its exact name.

    Raises:
        ValueError: no motion has this name.
    """
    if name not in MOTIONS:
        raise ValueError(f"no motion is called {name!r}; motions are {', '.join(MOTIONS)}")
    return HeroAtlas.load().num_attributes + MOTIONS.index(name)


def caption(attributes: ArrayLike) -> str:
    """Describe a clip in words; unspecified and empty slots are not mentioned.

    Args:
        attributes: (s,) integers.

    Returns:
        For example "a deep elf with a red cloak jumping".

    Raises:
        ValueError: wrong shape, or an id that does not belong to its slot.
    """
    ids = np.asarray(attributes)
    slots = len(HeroAtlas.load().slots) + 1
    if ids.shape != (slots,):
        raise ValueError(f"caption takes one clip, attributes ({slots},), got {ids.shape}")
    hero = prompts.caption(ids[:-1])
    if ids[-1] == UNSPECIFIED:
        return hero
    motion = int(ids[-1]) - HeroAtlas.load().num_attributes
    if not 0 <= motion < len(MOTIONS):
        raise ValueError(f"{int(ids[-1])} is not the id of a motion")
    return f"{hero} {MOTIONS[motion]}"


def parse_prompt(text: str) -> NDArray[np.int64]:
    """Read a free-text prompt.

    Args:
        text: for example "deep elf with a red cloak jumping" or "a minotaur walks to the left". Without words of motion
            the motion is left to the model.

    Returns:
        (s,) ids; 0 for what the text does not mention.

    Raises:
        ValueError: no text, empty or too long text, unknown words or parts that the clips do not show (the nearest known
            ones are named), two motions, two parts for one slot.
    """
    prompts.check_text(text)
    motion, rest = _take_motion(text)
    if motion == UNSPECIFIED or re.search(r"[^\W_]", rest):
        hero = _parse_hero(rest if motion != UNSPECIFIED else text, motion != UNSPECIFIED)
    else:
        hero = np.full(len(HeroAtlas.load().slots), UNSPECIFIED, dtype=np.int64)
    _check_shown(hero)
    return np.append(hero, motion)


def complete(attributes: ArrayLike, seeds: ArrayLike) -> NDArray[np.int64]:
    """Fill the unspecified slots at random, slot by slot from the distribution of the clips.

    Args:
        attributes: (b, s) integers.
        seeds: (b,) integers in [0, 2^64).

    Returns:
        (b, s) ids without zeros.
    """
    from vargen.datasets.motion.compose import sample_clip_attributes

    given = np.asarray(attributes, dtype=np.int64)
    return np.where(given == UNSPECIFIED, sample_clip_attributes(seeds), given)


def _parse_hero(text: str, has_motion: bool) -> NDArray[np.int64]:
    try:
        return prompts.parse_prompt(text)
    except prompts.NamesNothingError:
        if has_motion:  # "somebody jumping": anybody
            return np.full(len(HeroAtlas.load().slots), UNSPECIFIED, dtype=np.int64)
        raise
    except prompts.UnknownWordsError as error:
        if any(_motion_words().search(error.words[: prompts.MAX_NAMED], n=1, cutoff=0.8)):
            raise ValueError(f"{error}; motions are {', '.join(map(repr, MOTIONS))}") from None
        raise


def _check_shown(hero: NDArray[np.int64]) -> None:
    atlas = HeroAtlas.load()
    for slot, attribute in zip(atlas.slots, hero.tolist(), strict=True):
        shown = PARTS.get(slot, ())
        if attribute in (UNSPECIFIED, atlas.none_id(slot)):
            continue
        name = atlas.part(attribute).name
        if name not in shown:
            everything = [part for parts in PARTS.values() for part in parts]
            near = list(shown) or NearestPhrases(everything).search([name], cutoff=0.0)[0]
            raise ValueError(f"moving heroes do not have {name!r}; nearest known: {', '.join(map(repr, near))}")


def _take_motion(text: str) -> tuple[int, str]:
    """Return the id of the motion that the text names (0 = none) and the text without its words."""
    words = re.findall(r"[a-z]+|[^a-z]+", text.lower())
    places = [i for i, word in enumerate(words) if word[0].isalpha()]
    found: dict[str, str] = {}
    taken: set[int] = set()
    k = 0
    while k < len(places):
        used, motion = _match(words, places, k)
        if motion:
            found.setdefault(motion, " ".join(words[places[k + i]] for i in range(used)))
            taken.update(places[k : k + used])
        k += max(used, 1)
    if len(found) > 1:
        raise ValueError(f"two motions: {' and '.join(map(repr, found.values()))}; name only one")
    rest = "".join(word for i, word in enumerate(words) if i not in taken and word != "that")
    return (motion_id(next(iter(found))) if found else UNSPECIFIED), rest


def _match(words: list[str], places: list[int], start: int) -> tuple[int, str]:
    """Longest phrase of motion at a place: (number of words, motion), small words between skipped."""
    best = (0, "")
    key: list[str] = []
    for used in range(1, min(7, len(places) - start) + 1):
        between = "".join(words[places[start] : places[start + used - 1]])
        if "," in between:
            break
        word = words[places[start + used - 1]]
        if word in _BETWEEN:
            if not key:
                break
            continue
        key.append(_stem(word))
        motion = _table().get(tuple(key))
        if motion:
            best = (used, motion)
    return best


def _stem(word: str) -> str:
    if word in _FORMS:
        return _FORMS[word]
    for ending in ("ing", "es", "s"):
        if word.endswith(ending) and word.removesuffix(ending) in _stems():
            return word.removesuffix(ending)
    return word


@lru_cache(maxsize=1)
def _stems() -> frozenset[str]:
    return frozenset(word for phrases in _VERBS.values() for phrase in phrases for word in phrase.split())


@lru_cache(maxsize=1)
def _table() -> dict[tuple[str, ...], str]:
    return {
        tuple(word for word in phrase.split() if word not in _BETWEEN): motion
        for motion, phrases in _VERBS.items()
        for phrase in phrases
    }


@lru_cache(maxsize=1)
def _motion_words() -> NearestPhrases:
    return NearestPhrases(sorted(_stems() | set(_FORMS)))
