"""A web page on this machine: prompt in, pictures out, with the decode to watch.

What it does is :class:`vargen.serving.studio.Studio`; here it is put on a page of gradio (an optional extra) and served.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from vargen.pipelines.image import ImagePipeline
from vargen.registry import shipped_models
from vargen.serving.same_site import SameSite
from vargen.serving.studio import MAX_IMAGES, Studio, Update
from vargen.validation.places import INDEX_FILE

MAX_DRAWINGS = 8  # at a time: one draws, the others wait
MAX_QUEUE = 32  # events that wait for one of those places
SETTINGS = ("model", "prompt", "sampler", "seed", "guidance_scale", "temperature", "num_images")
EXAMPLES = (
    "deep elf with a red cloak, wizard hat and great sword",
    "a minotaur with plate armour and a battle axe",
    "mermaid with a trident",
    "mummy with a blue cloak",
)
TITLE = "# vargen\nPictures from autoregressive models, with the decode to watch. Everything runs on this machine."
MAP_LABEL = "Below: the codes of the picture; those of one colour came from one forward pass."


def drawable_models() -> list[str]:
    """Names of the shipped models that draw images."""
    indices = {model.name: json.loads((model.folder / INDEX_FILE).read_text()) for model in shipped_models()}
    return [name for name, index in indices.items() if index.get("_class_name") == ImagePipeline.__name__]


def build_page(studio: Studio, model: str) -> Any:
    """Return the page as ``gradio.Blocks``; gradio comes with the extra ``demo``."""
    gradio = import_gradio()
    names = list(dict.fromkeys([model, *drawable_models()]))
    start = studio.defaults(model)
    draw, halt, change = _handlers(studio, names)
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
                outputs = _pictures(gradio)
        which.change(change, which, [sampler, guidance, heat], show_progress="hidden")
        values = [which, prompt, sampler, seed, guidance, heat, count]  # in the order of SETTINGS
        drawing: Any = {"inputs": values, "outputs": outputs, "show_progress": "hidden"}
        for press in (go.click, prompt.submit):
            press(draw, **drawing, concurrency_limit=MAX_DRAWINGS, concurrency_id="drawings")
        stop.click(halt, queue=False)
    return page.queue(max_size=MAX_QUEUE)


def _pictures(gradio: Any) -> list[Any]:
    """Put picture, line and map on the page; returned in the order of an :data:`Update`."""
    look: dict[str, Any] = {"interactive": False, "format": "png", "show_label": False}
    look["buttons"] = ["download"]  # a label or more buttons would lie on the picture
    picture = gradio.Image(label="Picture", **look)
    line = gradio.Markdown("Press Draw.")
    gradio.Markdown(MAP_LABEL)
    return [picture, gradio.Image(label="Map", **look), line]


def _handlers(studio: Studio, names: list[str]) -> tuple[Any, Any, Any]:
    """What the page does when something is pressed: draw, stop, another model."""
    gradio = import_gradio()

    def draw(request: Any, *values: Any) -> Iterator[Update]:
        try:
            settings = dict(zip(SETTINGS, values, strict=True))
            yield from studio.draw(**settings | {"model": offered(values[0]), "session": request.session_hash})
        except ValueError as error:
            raise gradio.Error(str(error), print_exception=False) from None

    async def halt(request: Any) -> None:  # async: needs none of the threads in which drawings wait
        studio.stop(request.session_hash)

    def offered(name: str) -> str:
        if name not in names:  # anything else would be loaded from a path or the Hub
            raise gradio.Error("this model is not on the page", print_exception=False)
        return name

    def change(name: str) -> list[Any]:
        own = studio.defaults(offered(name))
        choices = gradio.Dropdown(choices=studio.samplers(name), value=own["sampler"])
        return [choices, own["guidance_scale"], own["temperature"]]

    draw.__annotations__["request"] = halt.__annotations__["request"] = gradio.Request  # gradio fills it in
    return draw, halt, change


def import_gradio() -> Any:
    """Import gradio, told to stay at home."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio

    return gradio


def serve(page: Any, host: str, port: int, allowed_hosts: Sequence[str] = (), wait: bool = True) -> None:
    """Serve the page until interrupted; fonts are the system's, nothing is fetched from elsewhere.

    Args:
        page: from :func:`build_page`.
        host: name or address to listen on.
        port: its port.
        allowed_hosts: further names that browsers may call the page by, see :class:`SameSite`.
        wait: False returns as soon as the page is served.
    """
    gradio = import_gradio()
    from starlette.middleware import Middleware  # comes with gradio

    guard = Middleware(SameSite, host=host, port=port, allowed=tuple(allowed_hosts))  # type: ignore[arg-type]
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page.launch(
        server_name=host,
        server_port=port,
        theme=theme,
        share=False,
        footer_links=[],
        ssr_mode=False,  # a server in front of this one would answer without the guard
        app_kwargs={"middleware": [guard]},
        prevent_thread_lock=not wait,
    )
