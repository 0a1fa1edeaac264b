"""A web page on this machine: prompt in, pictures out, with the decode to watch.

The handlers know nothing of gradio (an optional extra); :func:`build_page` puts them on a page.

Letters: B images, N code positions.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

from PIL import Image

from vargen.display import output_maps, output_sheet, stats_line
from vargen.pipelines.image import ImagePipeline
from vargen.preview import LivePreview
from vargen.registry import INDEX_FILE, fitting_samplers, shipped_models, swap_sampler

REFRESH = 0.1  # seconds between two looks at the preview
MAX_IMAGES = 16
EXAMPLES = (
    "deep elf with a red cloak, wizard hat and great sword",
    "a minotaur with plate armour and a battle axe",
    "mermaid with a trident",
    "mummy with a blue cloak",
)
TITLE = "# vargen\nPictures from autoregressive models, with the decode to watch. Everything runs on this machine."
MAP_LABEL = "Below: the codes of the picture; those of one colour came from one forward pass."

Update = tuple[Image.Image | None, Image.Image | None, str]  # picture, map of the decode, one line


def drawable_models() -> list[str]:
    """Names of the shipped models that draw images."""
    indices = {model.name: json.loads((model.folder / INDEX_FILE).read_text()) for model in shipped_models()}
    return [name for name, index in indices.items() if index.get("_class_name") == ImagePipeline.__name__]


class Studio:
    """Models that are loaded once, and one drawing at a time.

    Args:
        device: where models run.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._pipes: dict[str, Any] = {}
        self._busy = threading.Lock()

    def pipe(self, model: str) -> Any:
        """Return a model by name, folder or Hub id; it is loaded on first use.

        Raises:
            ValueError: unknown name (the nearest are shown).
        """
        if model not in self._pipes:
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
    ) -> Iterator[Update]:
        """Draw, and yield what there is to see: previews while it grows, then pictures, map and statistics.

        Closing the iterator stops the decode after its current forward pass.

        Args:
            model: name, folder or Hub id.
            prompt: what to draw.
            sampler: short name, see :meth:`samplers`.
            seed: image i uses ``seed + i``; None draws one.
            guidance_scale: 1 is off; None keeps the model's own.
            temperature: 0 is greedy; None keeps the model's own.
            num_images: 1 to 16.

        Raises:
            ValueError: as the pipeline's call; num_images out of range.
        """
        if not 1 <= num_images <= MAX_IMAGES:
            raise ValueError(f"num_images must be in 1..{MAX_IMAGES}, got {num_images}")
        pipe = self.pipe(model)
        chosen = swap_sampler(pipe.sampler, sampler, pipe.backbone)
        call = {
            "prompt": prompt,
            "seed": None if seed is None else int(seed),
            "guidance_scale": guidance_scale,
            "temperature": temperature,
            "num_images_per_prompt": int(num_images),
        }
        with self._busy:
            own, pipe.sampler = pipe.sampler, chosen
            work = _Work(pipe, call)
            try:
                yield from work.updates()
            finally:
                work.stop()
                pipe.sampler = own


class _Work:
    """One call of a pipeline in a thread of its own."""

    def __init__(self, pipe: Any, call: dict[str, Any]) -> None:
        self.pipe, self.call = pipe, call
        self.result: Any = None
        self.error: BaseException | None = None
        self.begun = time.perf_counter()
        self.preview = LivePreview(max_images=4, on_frame=lambda frame: None)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.result = self.pipe(**self.call, callback_on_step_end=self.preview)
        except BaseException as error:  # handed to the reader, who raises it
            self.error = error

    def updates(self) -> Iterator[Update]:
        shown = 0
        while self.thread.is_alive():
            self.thread.join(REFRESH)
            frames = self.preview.frames
            if len(frames) > shown and self.thread.is_alive():
                shown = len(frames)
                yield frames[-1], None, "drawing ..."
        if self.error is not None:
            raise self.error
        yield output_sheet(self.result), output_maps(self.result), self._line()

    def _line(self) -> str:
        codes = self.result.codes
        num_codes = sum(part.shape[1] for part in codes) if isinstance(codes, list) else codes.shape[1]
        line = stats_line(self.result.stats, len(self.result.seeds), num_codes, self.result.seeds)
        seconds = time.perf_counter() - self.begun
        return " · ".join([line, f"{seconds:.1f} s with the preview", *self.result.stats.notes])

    def stop(self) -> None:
        while self.thread.is_alive():
            self.pipe._interrupt = True  # again and again: a call that begins forgets it
            self.thread.join(REFRESH)


def build_page(studio: Studio, model: str) -> Any:
    """Return the page as ``gradio.Blocks``; gradio comes with the extra ``demo``."""
    gradio = import_gradio()
    names = list(dict.fromkeys([model, *drawable_models()]))
    start = studio.defaults(model)

    def draw(*values: Any) -> Iterator[Update]:
        try:
            yield from studio.draw(*values)
        except ValueError as error:
            raise gradio.Error(str(error), print_exception=False) from None

    def change(name: str) -> list[Any]:
        own = studio.defaults(name)
        choices = gradio.Dropdown(choices=studio.samplers(name), value=own["sampler"])
        return [choices, own["guidance_scale"], own["temperature"]]

    with gradio.Blocks(title="vargen", analytics_enabled=False) as page:
        gradio.Markdown(TITLE)
        with gradio.Row():
            with gradio.Column(scale=2):
                prompt = gradio.Textbox(EXAMPLES[0], label="Prompt", lines=2)
                which = gradio.Dropdown(names, value=model, label="Model")
                sampler = gradio.Dropdown(studio.samplers(model), value=start["sampler"], label="Sampler")
                with gradio.Row():
                    seed = gradio.Number(7, label="Seed", precision=0)
                    count = gradio.Slider(1, MAX_IMAGES, 4, step=1, label="Images")
                guidance = gradio.Slider(1, 8, start["guidance_scale"], step=0.1, label="Guidance (1 is off)")
                heat = gradio.Slider(0, 2, start["temperature"], step=0.05, label="Temperature (0 is greedy)")
                with gradio.Row():
                    go, stop = gradio.Button("Draw", variant="primary"), gradio.Button("Stop")
                gradio.Examples([[text] for text in EXAMPLES], inputs=[prompt])
            with gradio.Column(scale=3):
                look: dict[str, Any] = {"interactive": False, "format": "png", "show_label": False}
                look["buttons"] = ["download"]  # a label or more buttons would lie on the picture
                picture = gradio.Image(label="Picture", **look)
                line = gradio.Markdown("Press Draw.")
                gradio.Markdown(MAP_LABEL)
                maps = gradio.Image(label="Map", **look)
        which.change(change, which, [sampler, guidance, heat], show_progress="hidden")
        inputs = [which, prompt, sampler, seed, guidance, heat, count]
        drawing: Any = {"inputs": inputs, "outputs": [picture, maps, line], "show_progress": "hidden"}
        running = [go.click(draw, **drawing), prompt.submit(draw, **drawing)]
        stop.click(None, cancels=running)
    return page


def import_gradio() -> Any:
    """Import gradio, told to stay at home."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio

    return gradio


def serve(page: Any, host: str, port: int) -> None:
    """Serve the page until interrupted; fonts are the system's, nothing is fetched from elsewhere."""
    gradio = import_gradio()
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page.launch(server_name=host, server_port=port, theme=theme, share=False, footer_links=[])
