"""What comes from outside is checked here: single values, lists, and all arguments of a constructor before it runs.

Every check takes a name and a value and returns the value as the library reads it (a numpy integer becomes ``int``, a list
from a JSON file a tuple), or raises ``ValueError`` with one line: the name, what is allowed, what was given. Plain Python:
nothing is imported or allocated for it.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, wraps
from numbers import Integral, Real
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar, cast

from vargen.validation.printable import shown

MAX_SEED = 2**64
# what a configuration may ask for; published models stay far below
MAX_WIDTH = 2**16  # numbers of one position
MAX_BLOCKS = 2**10  # layers of one stack
MAX_ROWS = 2**24  # rows of a table: codes, classes, attributes, words
MAX_POSITIONS = 2**18  # of a sequence, condition included
MAX_LISTED = 18  # names of settings in a message
LONGEST_LIST = 250  # characters of a list of choices
NEAR = 0.7  # likeness, of 1, from which a name is suggested
MIN_BEGUN = 3  # letters with which a name, or one behind it, must begin to be suggested
MAX_NEAR = 6  # choices shown of a longer one
MAX_NUMBERS = 2**35  # weights and tables of a model, five times the largest published one

Check = Callable[[str, Any], Any]
Rule = Callable[[Any], None]  # reads a namespace of all settings, raises ValueError for those that do not go together
Init = TypeVar("Init", bound=Callable[..., Any])


class Settings(NamedTuple):
    """What a constructor takes: a check for each argument, and rules over all of them."""

    checks: Mapping[str, Check]
    rules: tuple[Rule, ...] = ()
    weights: Callable[..., int] | None = None  # about how many numbers the object holds, from some of the settings


def nearest(word: Any, known: Iterable[Any]) -> str | None:
    """The known word that ``word`` may be a slip of; None where none is near."""
    text = (word if isinstance(word, str) else shown(word))[:80].lower()
    words = [str(one) for one in known]
    begun = [one for one in words if one.lower().startswith(text) or text.startswith(one.lower())]
    if len(text) >= MIN_BEGUN and begun:
        return difflib.get_close_matches(text, begun, n=1, cutoff=0.0)[0]
    lowered = {one.lower(): one for one in words}
    near = difflib.get_close_matches(text, lowered, n=1, cutoff=NEAR)
    return lowered[near[0]] if near else None


def _did_you_mean(word: Any, known: Iterable[Any]) -> str:
    near = nearest(word, known)
    return f"; did you mean {near!r}?" if near is not None else ""


def _nearest(word: Any, known: Iterable[Any], count: int) -> list[str]:
    text = word[:80] if isinstance(word, str) else shown(word)
    return difflib.get_close_matches(text, [str(k) for k in known], n=count, cutoff=0.0)


def check_names(
    given: Iterable[Any], known: Sequence[str], owner: str, instead: Mapping[str, str] | None = None
) -> None:
    """Raise ``ValueError`` for the first name that is not a setting, naming one that is near, or what to use instead.

    Args:
        given: names.
        known: those that there are.
        owner: whose they are.
        instead: other libraries' names to what is used here.
    """
    for name in given:
        if name in known:
            continue
        if isinstance(name, str) and instead and name in instead:
            raise ValueError(f"{owner} has no setting {name!r}: {instead[name]}")
        near = _did_you_mean(name, known)
        names = f"{'' if near else ';'} Settings: {', '.join(known)}" if len(known) <= MAX_LISTED else ""
        raise ValueError(f"{owner} has no setting {shown(name)}{near}{names}")


def check_number(
    name: str,
    value: Any,
    *,
    low: float,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
    hint: str = "",
) -> float:
    """Return a finite number in the range, as ``float``."""
    bounds = f"{'greater than' if open_low else 'at least'} {low:g}" + (
        f" and {'less than' if open_high else 'at most'} {high:g}" if high < math.inf else ""
    )
    hint = f" ({hint})" if hint else ""
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number {bounds}, got {shown(value)}{hint}")
    if number < low or number > high or (open_low and number == low) or (open_high and number == high):
        raise ValueError(f"{name} must be {bounds}, got {shown(value)}{hint}")
    return number


def check_integer(name: str, value: Any, *, low: int, high: int | None = None, hint: str = "") -> int:
    """Return an integer in the range, as ``int``."""
    bounds = f"at least {low}" if high is None else f"in {low}..{high}"
    if (
        isinstance(value, bool)
        or not isinstance(value, Integral)
        or int(value) < low
        or (high is not None and int(value) > high)
    ):
        raise ValueError(f"{name} must be an integer {bounds}, got {shown(value)}" + (f" ({hint})" if hint else ""))
    return int(value)


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> Any:
    """Return the allowed word that ``value`` is; the nearest one is shown."""
    for word in allowed:
        if isinstance(value, type(word)) and value == word:
            return word
    words = ", ".join(map(str, allowed))
    if len(words) > LONGEST_LIST:
        near = _nearest(value, allowed, MAX_NEAR)
        words = f"{', '.join(near)} and {len(allowed) - len(near)} more"
    raise ValueError(f"{name} must be one of {words}, got {shown(value)}{_did_you_mean(value, allowed)}")


def check_flag(name: str, value: Any) -> bool:
    """Return True or False; 0, 1 and words are neither."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {shown(value)}")
    return value


def check_text(name: str, value: Any, *, longest: int = 1000) -> str:
    """Return a text that is not empty."""
    if not isinstance(value, str) or not 1 <= len(value) <= longest:
        raise ValueError(f"{name} must be a text of 1..{longest} characters, got {shown(value)}")
    return value


def check_list(name: str, value: Any, *, item: Check, lengths: Sequence[int], words: str) -> tuple[Any, ...]:
    """Return a list or tuple of one of the ``lengths`` as a tuple, each entry checked by ``item``."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence) or len(value) not in lengths:
        raise ValueError(f"{name} must be {words}, got {shown(value)}")
    return tuple(item(f"{name}[{index}]", entry) for index, entry in enumerate(value))


def check_scales(name: str, value: Any, *, longest: int = 64) -> tuple[int | tuple[int, int], ...]:
    """Return sides or (height, width) pairs of code grids, none larger than the last one."""
    words = f"a list of 1..{longest} sides or (height, width) pairs"

    def side(part: str, entry: Any) -> int:
        return check_integer(part, entry, low=1, high=MAX_POSITIONS)

    def scale(part: str, entry: Any) -> int | tuple[int, int]:
        pair = isinstance(entry, list | tuple)
        found = check_list(part, entry, item=side, lengths=(2,), words="a side or (height, width)") if pair else ()
        return cast(tuple[int, int], found) if pair else side(part, entry)

    found = check_list(name, value, item=scale, lengths=range(1, longest + 1), words=words)
    height, width = pair_of(found[-1])
    if any(h > height or w > width for h, w in map(pair_of, found)):
        raise ValueError(f"{name}: no scale may be larger than the last one {(height, width)}, got {shown(value)}")
    return found


def read_grid(
    name: str, value: Any, *, lengths: Sequence[int] = (2,), high: int = MAX_POSITIONS, words: str = ""
) -> tuple[int, ...]:
    """Return the sides of a grid of codes; one number is a square."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Integral) and not isinstance(value, bool):
        value = (value, value)
    axes = "(height, width) or (frames, height, width) in codes" if 3 in lengths else "(height, width) in codes"
    item = partial(check_integer, low=1, high=high)
    return check_list(name, value, item=item, lengths=lengths, words=f"{words or axes}, or one number for a square")


def pair_of(scale: int | tuple[int, int]) -> tuple[int, int]:
    """A side or a pair as (height, width)."""
    return (scale, scale) if isinstance(scale, int) else scale


def check_seeds(seeds: Any, num_images: int) -> list[int]:
    """Return the seeds (one, a list or a tensor) as a list of ``num_images`` integers in [0, 2^64)."""
    given = seeds.tolist() if hasattr(seeds, "tolist") else seeds
    listed: list[Any] = list(given) if isinstance(given, (list, tuple, range)) else [given]
    for seed in listed:
        check_integer("seed", seed, low=-MAX_SEED // 2, high=MAX_SEED - 1)
    if len(listed) != num_images:
        raise ValueError(f"seeds must hold one integer an image: {num_images} images, got {len(listed)} seeds")
    return [int(seed) % MAX_SEED for seed in listed]


def anything(name: str, value: Any) -> Any:
    """Accept objects, which their user checks."""
    return value


def optional(check: Check) -> Check:
    """The check, or None."""

    def checked_or_none(name: str, value: Any) -> Any:
        try:
            return None if value is None else check(name, value)
        except ValueError as error:
            raise ValueError(f"{error}; None is allowed") from None

    return checked_or_none


def at_most(limit: int, unit: str, count: Callable[..., int]) -> Rule:
    """A rule: ``count``, whose parameters are the settings it reads (None if absent), gives no more than ``limit``."""
    names = tuple(inspect.signature(count).parameters)

    def rule(settings: Any) -> None:
        read = {name: getattr(settings, name, None) for name in names}
        if (total := count(**read)) > limit:
            given = ", ".join(f"{name}={shown(value)}" for name, value in read.items() if value is not None)
            raise ValueError(f"at most {limit} {unit} are allowed, about {total} would follow from {given}")

    return rule


def checked(settings: Settings) -> Callable[[Init], Init]:
    """Decorate the constructor of a configured class: all arguments are checked before anything is built.

    Stands above ``register_to_config``, so that a configuration holds the values as they were read. Defaults are read
    by the rules only.

    Args:
        settings: one check for each parameter of the constructor, no more and no fewer.
    """

    def decorate(init: Init) -> Init:
        signature = inspect.signature(init)
        size = () if settings.weights is None else (at_most(MAX_NUMBERS, "weights", settings.weights),)
        defaults = {name: p.default for name, p in list(signature.parameters.items())[1:]}
        if unlike := defaults.keys() ^ settings.checks.keys():
            raise TypeError(f"{init.__qualname__}: arguments and checks differ in {', '.join(sorted(unlike))}")

        @wraps(init)
        def checked_init(self: Any, *args: Any, **given: Any) -> None:
            private = {name: value for name, value in given.items() if name.startswith("_")}  # of diffusers
            named = {name: value for name, value in given.items() if name not in private}
            owner = type(self).__name__
            check_names(named, tuple(defaults), owner)
            bound = dict(list(signature.bind(self, *args, **named).arguments.items())[1:])
            try:
                values = {name: settings.checks[name](name, value) for name, value in bound.items()}
                for rule in (*settings.rules, *size):
                    rule(SimpleNamespace(**{**defaults, **values}))
            except ValueError as error:
                raise ValueError(f"{owner}: {error}") from None
            init(self, **values, **private)

        checked_init.settings = settings  # type: ignore[attr-defined]  # for whoever asks what a class takes
        return cast(Init, checked_init)

    return decorate
