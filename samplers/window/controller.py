"""How wide the next window is: the width with the most expected committed codes per second.

A controller is any object with the two methods of ``WidthController``; give one of your own as ``window=`` of
``SpeculativeJacobiSampler`` (``num_draft_tokens=`` of ``SpeculativeSampler``). With the shared-noise rule codes do not depend on
widths, so a controller decides about time alone. The library's own learns from the iterations of the run: how often guesses
prove right, and what iterations cost. Nothing is run to measure.

Letters: A images still decoded, W window.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import numpy as np

WIDTHS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)  # that the library's controller chooses among
# relative cost of an iteration by rows A * W, used until the run has iterations of its own; between and beyond by interpolation
# CPU: between LlamaGen-B and heroes32-llamagen, float32, one thread; other devices read weights in the time of hundreds of rows
PRIORS = {
    "cpu": {1: 1.0, 2: 1.3, 4: 1.5, 8: 1.9, 16: 2.4, 32: 3.2, 64: 5.3, 128: 8.2, 256: 13.5},
    "other": {1: 1.0, 64: 1.05, 256: 1.5, 512: 2.6, 1024: 5.0},
}
MEMORY = 0.97  # what an iteration keeps of the weight of those before it
EARLY = 0.2  # by so much the steady state overstates how often slots were seen (fitted at widths 2 to 64)
SETTLE = 5  # iterations in which a wider window fills with slots that were seen often enough
TRUST = 6.0  # guesses that the prior counts for
LEAVE = (
    1.08  # the first window of several images must promise so much more: ragged passes of one row cost 1.05 to 1.15
)
STAY = 1.03  # another width must promise so much more
RECONSIDER = 6  # iterations between two comparisons of all widths
LOOK = 2  # iterations of a look at another width
AGAIN = 48  # iterations before a width is looked at again
BUDGET = 0.02  # of the time that looks may lose
RECENT = 9  # times of a width that are remembered; their median counts


@dataclass(frozen=True)
class Situation:
    """What a controller knows when it chooses."""

    widths: tuple[int, ...]  # to choose among; what memory does not hold is left out
    width: int  # of the iteration before
    num_images: int  # A
    most_left: int  # codes that the image farthest behind still needs; wider windows are cut
    device: str  # "cpu", "cuda", ...


@dataclass(frozen=True)
class Iteration:
    """What became of iterations of one width."""

    width: int
    num_images: int  # A
    seconds: float  # an iteration, mean over them where the host looks rarely
    num_iterations: int
    tested: list[int]  # guesses compared with the code drawn, by how often the model had seen them (chains: by depth)
    right: list[int]  # those that were equal


class WidthController(Protocol):
    """Chooses widths; one object may serve several runs."""

    def choose(self, situation: Situation) -> int:
        """Return the width of the next iteration, 1 for next-token sampling."""
        ...

    def observe(self, iteration: Iteration) -> None:
        """Learn from what was done; comes before the next ``choose``."""
        ...


# of continuous tokens, whose chains cost more than the backbone and less by row (heroes32-mar-causal)
CHAINS = {1: 1.0, 32: 1.7, 256: 5.7}
SETTLING = (0.0, 0.1, 0.25, 0.35, 0.5, 0.55, 0.6, 0.65, 0.65, 0.65, 0.65, 0.7, 0.7, 0.75, 0.75, 0.8)  # by age, at 1e-4


def is_controller(value: Any) -> bool:
    """Whether this is an object that chooses widths."""
    return callable(getattr(value, "choose", None)) and callable(getattr(value, "observe", None))


class Acceptance:
    """How often guesses prove right, by kind, as seen in this run."""

    def __init__(self, prior: list[float]) -> None:
        self.prior = np.array(prior)
        self.tested, self.right = np.zeros(len(prior)), np.zeros(len(prior))

    def observe(self, iteration: Iteration) -> None:
        """Count the guesses of some iterations; old ones fade."""
        fade = MEMORY**iteration.num_iterations
        for counts, more in ((self.tested, iteration.tested), (self.right, iteration.right)):
            counts *= fade
            counts[: len(more)] += more[: len(counts)]
            counts[-1] += sum(more[len(counts) :])

    @property
    def rates(self) -> Any:
        """Share of right guesses of every kind."""
        return (self.right + TRUST * self.prior) / (self.tested + TRUST)

    def expected(self, widths: Sequence[int]) -> Any:
        """Codes that an image commits in an iteration of each width."""
        raise NotImplementedError


class ByDepth(Acceptance):
    """Of chains: the guess at depth d is right so often if those before it were."""

    def __init__(self) -> None:
        super().__init__([0.7] * WIDTHS[-1])

    def expected(self, widths: Sequence[int]) -> Any:
        """One code, and every guess that is right with all before it."""
        rates = self.rates[np.minimum(np.arange(max(widths)), len(self.prior) - 1)]
        return np.cumsum(np.append(1.0, rates.cumprod()))[np.array(widths) - 1]


class ByAge(Acceptance):
    """Of Jacobi windows: a guess that the model has seen k times is right so often if those before it are.

    In the steady state of a width a slot enters at the end of the window and comes nearer by what an iteration commits, so that
    width decides how often slots have been seen when it is their turn. What the run commits corrects the whole.
    """

    def __init__(self, prior: Sequence[float] = (0.02, 0.55, 0.75, 0.8, 0.82, 0.84, 0.86, 0.88)) -> None:
        super().__init__(list(prior))
        self.committed: dict[int, float] = defaultdict(float)  # by width
        self.passes: dict[int, float] = defaultdict(float)  # of one image
        self.width, self.settling = 1, 0  # of the iteration before, iterations until its steady state

    def observe(self, iteration: Iteration) -> None:
        """Count commits too, but for windows of one, which tell nothing, and windows that were just widened."""
        super().observe(iteration)
        if iteration.width > self.width:
            self.settling = SETTLE
        self.width = iteration.width
        self.settling -= max(1, iteration.num_iterations)
        fade, committed = MEMORY**iteration.num_iterations, sum(iteration.tested)
        for width in self.passes:
            self.committed[width] *= fade
            self.passes[width] *= fade
        if iteration.width == 1 or self.settling >= 0:
            return
        if committed:
            self.committed[iteration.width] += committed
            self.passes[iteration.width] += iteration.num_images * iteration.num_iterations

    def expected(self, widths: Sequence[int]) -> Any:
        """The steady states, by the ratio of what was committed to what they say of the widths used."""
        used = list(self.passes)
        steady = self._steady(np.array([*widths, *used]))
        told = float(
            np.dot(steady[len(widths) :] - 1.0, [self.passes[w] for w in used])
        )  # all but the first of a pass
        ratio = (sum(self.committed.values()) - sum(self.passes.values()) + TRUST) / (told + TRUST)
        return 1.0 + (steady[: len(widths)] - 1.0) * ratio

    def _steady(self, widths: Any) -> Any:
        """Iterate commits -> ages -> commits a few times, from a number that would see every slot often."""
        last = widths[:, None] - 1
        places, kinds, rates = np.arange(int(last.max())), np.arange(len(self.prior)), self.rates
        inside = places < last
        committed = 1.0 + 0.2 * last
        for _ in range(4):
            ages = (last - places) / committed - EARLY
            right = np.interp(ages, kinds, rates).cumprod(axis=1)
            committed = 0.5 * (committed + 1.0 + (right * inside).sum(axis=1, keepdims=True))
        return committed[:, 0]


class Costs:
    """Seconds of an iteration by width and images: what was measured, and the prior's shape where nothing was."""

    def __init__(self, table: Mapping[int, float]) -> None:
        self.rows, self.cost = np.log(list(table)), np.log(list(table.values()))
        self.slope = (self.cost[-1] - self.cost[-2]) / (self.rows[-1] - self.rows[-2])
        # by width, images and whether these differ in length: log of measured over prior
        self.excess: dict[tuple[int, int, bool], deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))
        self.begun: set[int] = set()

    def observe(self, width: int, num_images: int, ragged: bool, seconds: float) -> None:
        """Remember a time; the first of a width also pays for what is made once."""
        if width in self.begun:
            excess = math.log(max(seconds, 1e-9)) - self._prior(width, num_images)
            self.excess[width, num_images, ragged].append(excess)
        self.begun.add(width)

    def estimates(self, widths: tuple[int, ...], num_images: int, ragged: bool) -> dict[int, float]:
        """Seconds an iteration of each width; in units of one row where none was measured yet."""
        return {w: math.exp(self._prior(w, num_images) + self._correction(w, num_images, ragged)) for w in widths}

    def measured(self, width: int, num_images: int, ragged: bool) -> bool:
        """Whether a width has times of its own."""
        return len(self.excess.get((width, num_images, ragged), ())) > 0

    def _correction(self, width: int, num_images: int, ragged: bool) -> float:
        """Of this width, else between its neighbours in width, else in rows; windows leave images ragged."""
        ragged = ragged or width > 1
        choices: tuple[dict[float, deque[float]], ...] = (
            {w: times for (w, n, r), times in self.excess.items() if n == num_images and r == ragged and times},
            {w: times for (w, n, _), times in self.excess.items() if n == num_images and times},
            {w * n / num_images: times for (w, n, _), times in self.excess.items() if times},
        )
        for known in choices:
            if known:
                at = sorted(known)
                values = [median(known[w]) for w in at]
                return float(np.interp(math.log(width), [math.log(w) for w in at], values))
        return 0.0

    def _prior(self, width: int, num_images: int) -> float:
        rows = math.log(width * num_images)
        beyond = max(0.0, rows - self.rows[-1])
        return float(np.interp(rows, self.rows, self.cost)) + beyond * float(max(self.slope, 1.0))


_KNOWN: WeakKeyDictionary[Any, dict[Any, tuple[Costs, list[float]]]] = WeakKeyDictionary()


def _remembers(known: Any) -> bool:
    try:
        return known is not None and bool(ref(known)) and hash(known) is not None
    except TypeError:
        return False


class AutoController:
    """Takes the width with the most expected committed codes per second, and looks at its neighbours now and then.

    A look is an iteration or two of another width, which commit codes like all others; what looks have lost against the best
    width stays below ``BUDGET`` of the time. Images that advance by windows differ in length from then on, and passes of one row
    cost more than before: the first window must promise more than later ones.

    Args:
        acceptance: ``ByAge()`` for Jacobi windows, ``ByDepth()`` for chains of a drafter.
        prior: relative cost of an iteration by rows; None takes that of the device.
        known: an object (the backbone) whose earlier runs in this process are remembered: their costs, and how often guesses
            were right.
        kind: what else must be equal for that, such as the number of guidance branches.
    """

    patient = True  # windows of one may pass before it is asked again

    def __init__(
        self,
        acceptance: Acceptance | None = None,
        prior: Mapping[int, float] | None = None,
        known: Any = None,
        kind: Any = None,
    ) -> None:
        self.acceptance, self.prior = ByAge() if acceptance is None else acceptance, prior
        self.known, self.kind = known if _remembers(known) else None, (type(self.acceptance).__name__, kind)
        self.costs: Costs | None = None
        self.best, self.choice = 0, 0
        self.compared, self.hold, self.num_images = 0, 0, 0  # iterations at the last comparison, until the next
        self.ragged = False
        self.promised: dict[int, float] = {}  # codes an iteration of each width
        self.speed = 0.0  # codes a second expected of the best width
        self.iterations, self.spent, self.lost = 0, 0.0, 0.0  # and the seconds
        self.tried: dict[int, int] = {}  # when a neighbour was looked at last, in iterations

    def choose(self, situation: Situation) -> int:
        """Compare all widths now and then; stay where little would be gained."""
        costs = self._open(situation.device)
        same = self.choice in situation.widths and self.num_images == situation.num_images
        if same and self.iterations - self.compared < self.hold:
            return self.choice
        num_images = situation.num_images
        seconds = costs.estimates(situation.widths, num_images, self.ragged)
        self.promised = dict(zip(situation.widths, self.acceptance.expected(situation.widths).tolist(), strict=True))
        speed = {w: codes / seconds[w] for w, codes in self.promised.items()}
        if num_images > 1 and not self.ragged:
            speed = {w: value / (LEAVE if w > 1 else 1.0) for w, value in speed.items()}
        best = max(speed, key=speed.__getitem__)
        if self.best not in speed or speed[best] > STAY * speed[self.best]:
            self.best = best
        if num_images > 1 and not self.ragged and not costs.measured(1, num_images, False):
            self.best = 1  # what a window is worth shows beside it
        self.speed = speed[self.best]
        look = self._look(situation.widths, seconds, costs)
        self.choice, self.hold = (look, LOOK) if look else (self.best, RECONSIDER)
        self.compared, self.num_images = self.iterations, num_images
        return self.choice

    def observe(self, iteration: Iteration) -> None:
        """Learn acceptance and cost."""
        seconds = iteration.seconds * iteration.num_iterations
        self.iterations, self.spent = self.iterations + iteration.num_iterations, self.spent + seconds
        if iteration.width != self.best and iteration.width == self.choice and self.speed:
            gained = iteration.num_iterations * self.promised[iteration.width] / self.speed
            self.lost += max(0.0, seconds - gained)
        self.ragged = self.ragged or (iteration.width > 1 and iteration.num_images > 1)
        if self.costs is not None:
            self.costs.observe(iteration.width, iteration.num_images, self.ragged, iteration.seconds)
        self.acceptance.observe(iteration)
        self._remember()

    def _open(self, device: str) -> Costs:
        """Costs of this backbone, as far as earlier runs know them."""
        if self.costs is None:
            found = _KNOWN.get(self.known, {}) if self.known is not None else {}
            if self.kind in found:
                self.costs, rates = found[self.kind]
                self.acceptance.prior = np.array(rates)
            else:
                self.costs = Costs(self.prior or PRIORS.get(device, PRIORS["other"]))
        return self.costs

    def _remember(self) -> None:
        if self.known is not None and self.costs is not None:
            found = _KNOWN.setdefault(self.known, {})
            found[self.kind] = (self.costs, self.acceptance.rates.tolist())

    def _look(self, widths: tuple[int, ...], seconds: dict[int, float], costs: Costs) -> int | None:
        """The neighbour to look at, if there is one whose expected loss the budget allows."""
        images = self.num_images
        if not costs.measured(self.best, images, self.ragged) or self.choice != self.best:
            return None
        if self.best == 1 and not self.ragged and images > 1:
            return None  # a look would leave the images ragged
        place = widths.index(self.best)
        for width in sorted(widths[max(0, place - 1) : place + 2], key=lambda w: self.tried.get(w, -AGAIN)):
            due = self.iterations - self.tried.get(width, -AGAIN) >= AGAIN
            loss = LOOK * (seconds[width] - self.promised[width] / self.speed)
            if width != self.best and due and self.lost + max(0.0, loss) <= BUDGET * self.spent:
                self.tried[width] = self.iterations
                return width
        return None


class Replayed:
    """The widths of an earlier run, one after the other.

    Args:
        widths: of every iteration behind the prefill, ``stats.widths``.
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        self.widths, self.used = widths, 0

    def choose(self, situation: Situation) -> int:
        """The width that is next, the last one where the list has ended."""
        return self.widths[min(self.used, len(self.widths) - 1)]

    def observe(self, iteration: Iteration) -> None:
        """Go on in the list."""
        self.used += iteration.num_iterations
