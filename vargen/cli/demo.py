"""`vargen demo`: a web page on this machine."""

from __future__ import annotations

import importlib.util
from typing import Annotated

import typer

from vargen.cli import _common

DEFAULT_MODEL = "heroes32-llamagen"


@_common.one_line_errors
def demo(
    model: _common.Model = DEFAULT_MODEL,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 7860,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Further name that browsers may call the page by, such as that of a proxy; may be repeated."
        ),
    ] = None,
    device: _common.Device = None,
) -> None:
    """Serve a web page: prompt, sampler, seed and guidance, a live preview, and the map of the decode.

    It needs the extra `demo` (gradio). Nothing leaves this machine. Requests under other names than localhost and the host
    given here are refused, and so are those that other sites send.

    \b
    Examples:
      vargen demo
      vargen demo -m heroes32-var --port 8000
    """
    if importlib.util.find_spec("gradio") is None:  # before anything large is imported
        raise ImportError("vargen demo needs gradio; install it with: pip install 'vargen[demo]'")
    if not 1 <= port <= 65535:
        raise ValueError(f"port must be in 1..65535, got {port}")
    from vargen.serving.same_site import check_names

    check_names(allow_host or [])
    from vargen.serving.demo import Studio, build_page, serve

    serve(build_page(Studio(_common.pick_device(device)), model), host, port, allow_host or [])
