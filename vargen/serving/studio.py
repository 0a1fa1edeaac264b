"""What the web page does, without the page: models that are loaded once, drawings that take turns and can be stopped."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from numbers import Real
from typing import Any

from PIL import Image

from vargen.conditioners.base import check_prompt
from vargen.display.notebook import output_maps, output_sheet, stats_line
from vargen.display.preview import LivePreview
from vargen.pipelines import inputs
from vargen.pipelines.image import ImagePipeline
from vargen.random import check_seeds
from vargen.registry import fitting_samplers, swap_sampler
from vargen.validation.checks import check_integer, check_text

REFRESH = 0.1  # seconds between two looks at the preview, and at whose turn it is
MAX_IMAGES = 16

Update = tuple[Image.Image | None, Image.Image | None, str]  # picture, map of the decode, one line


class Studio:
    """Models that are loaded once, and one drawing at a time.

    Args:
        device: where models run.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._pipes: dict[str, Any] = {}
        self._loading = threading.Lock()
        self._busy = threading.Lock()
        self._asked: dict[threading.Event, str | None] = {}  # set to stop -> session that asked for the drawing

    def pipe(self, model: str) -> Any:
        """Return a model by name, folder or Hub id; it is loaded on first use.

        Raises:
            ValueError: unknown name (the nearest are shown).
        """
        if model not in self._pipes:
            with self._loading:
                if model not in self._pipes:  # somebody else may have loaded it meanwhile
                    pipe = ImagePipeline.from_pretrained(model).to(self.device)
                    pipe.set_progress_bar_config(disable=True)
                    self._pipes[model] = pipe
        return self._pipes[model]

    def samplers(self, model: str) -> list[str]:
        """Short names of the samplers that fit a model."""
        return fitting_samplers(self.pipe(model).backbone)

    def defaults(self, model: str) -> dict[str, Any]:
        """Sampler, guidance and temperature that a model was saved with."""
        pipe = self.pipe(model)
        names = self.samplers(model)
        own = next(
            (name for name in names if swap_sampler(pipe.sampler, name, pipe.backbone) is pipe.sampler), names[0]
        )
        return {"sampler": own, **{k: getattr(pipe.sampler, k, 1.0) for k in ("guidance_scale", "temperature")}}

    def draw(
        self,
        model: str,
        prompt: str,
        sampler: str,
        seed: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        num_images: int = 1,
        session: str | None = None,
    ) -> Iterator[Update]:
        """Draw, and yield what there is to see: previews while it grows, then pictures, map and statistics.

        Everything is read and checked before the drawing waits for its turn. Closing the iterator stops the decode after
        its current forward pass, and so does :meth:`stop`; what is drawn by then is shown.

        Args:
            model: name, folder or Hub id.
            prompt: what to draw.
            sampler: short name, see :meth:`samplers`.
            seed: image i uses ``seed + i``; None draws one.
            guidance_scale: 1 is off; None keeps the model's own.
            temperature: 0 is greedy; None keeps the model's own.
            num_images: 1 to 16.
            session: who asks, for :meth:`stop`.

        Raises:
            ValueError: as the pipeline's call; num_images out of range.
        """
        call: dict[str, Any] = {"prompt": prompt, "seed": None if seed is None else _whole(seed)}
        call["num_images_per_prompt"] = check_integer("num_images", _whole(num_images), low=1, high=MAX_IMAGES)
        settings = {"guidance_scale": guidance_scale, "temperature": temperature}
        settings = {name: value for name, value in settings.items() if value is not None}
        check_seeds(call["seed"], None, call["num_images_per_prompt"])
        check_prompt(prompt, "the prompt")
        stopping = threading.Event()
        self._asked[stopping] = session
        try:
            pipe = self.pipe(check_text("model", model))
            chosen = swap_sampler(pipe.sampler, check_text("sampler", sampler, longest=100), pipe.backbone).replace(
                **settings
            )
            prompts = inputs.read_prompts(prompt)
            if hasattr(pipe.conditioner, "check"):
                pipe.conditioner.check(prompts)
            yield from _Work(pipe, chosen, call, self._busy, stopping).updates()
        finally:
            stopping.set()
            del self._asked[stopping]

    def stop(self, session: str | None = None) -> None:
        """Stop what a session draws, after the current forward pass, and what it has waiting; others go on."""
        for stopping, asked_by in list(self._asked.items()):
            if asked_by == session:
                stopping.set()


class _Work:
    """One call of a pipeline in a thread of its own, which waits for its turn and gives it back when told to stop."""

    def __init__(
        self, pipe: Any, sampler: Any, call: dict[str, Any], busy: threading.Lock, stopping: threading.Event
    ) -> None:
        self.pipe, self.sampler, self.call, self.busy, self.stopping = pipe, sampler, call, busy, stopping
        self.result: Any = None
        self.error: BaseException | None = None
        self.begun: float | None = None
        self.preview = LivePreview(max_images=4, on_frame=lambda frame: None)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            while not self.busy.acquire(timeout=REFRESH):
                if self.stopping.is_set():
                    return
            try:
                self._draw()
            finally:
                self.busy.release()
        except BaseException as error:  # handed to the reader, who raises it
            self.error = error

    def _draw(self) -> None:
        if self.stopping.is_set():
            return
        self.begun = time.perf_counter()
        own, self.pipe.sampler = self.pipe.sampler, self.sampler
        try:
            self.result = self.pipe(**self.call, callback_on_step_end=self._watch)
        finally:
            self.pipe.sampler = own

    def _watch(self, pipe: Any, *state: Any) -> None:
        if self.stopping.is_set():
            pipe._interrupt = True
        else:
            self.preview(pipe, *state)

    def updates(self) -> Iterator[Update]:
        shown, told = 0, False
        while self.thread.is_alive():
            self.thread.join(REFRESH)
            if self.begun is None and not told and self.thread.is_alive():
                told = True
                yield None, None, "waiting for another drawing ..."
            frames = self.preview.frames
            if len(frames) > shown and self.thread.is_alive():
                shown = len(frames)
                yield frames[-1], None, "drawing ..."
        if self.error is not None:
            raise self.error
        if self.result is None:
            yield None, None, "stopped before it began"
        else:
            yield output_sheet(self.result), output_maps(self.result), self._line()

    def _line(self) -> str:
        stats, codes = self.result.stats, self.result.codes
        num_codes = sum(part.shape[1] for part in codes) if isinstance(codes, list) else codes.shape[1]
        line = stats_line(stats, len(self.result.seeds), num_codes, self.result.seeds)
        if stats.forwards_per_image is None and self.stopping.is_set():  # not all codes are there to be counted
            line = "stopped"
        seconds = time.perf_counter() - (self.begun or 0.0)
        return " · ".join([line, f"{seconds:.1f} s with the preview", *stats.notes])


def _whole(value: Any) -> Any:
    """A number from a web page as an integer, where it is whole: JSON does not tell 4 from 4.0."""
    whole = isinstance(value, Real) and not isinstance(value, bool) and value % 1 == 0
    return int(value) if whole else value
