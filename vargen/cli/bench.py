"""`vargen bench`: samplers side by side on one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vargen.cli import _common

DEFAULT_MODEL = "heroes32-llamagen"


@_common.one_line_errors
def bench(
    model: _common.Model = DEFAULT_MODEL,
    samplers: Annotated[
        list[str] | None,
        typer.Option(
            "-s", "--sampler", help="Sampler, as in jacobi:window=16; repeatable, the first is the baseline."
        ),
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes to time.")] = "1,8",
    num: Annotated[int, typer.Option("-n", "--num", help="Images of the quality runs; 0 only takes times.")] = 512,
    repeats: Annotated[int, typer.Option(help="Timed rounds.")] = 3,
    classes: Annotated[int | None, typer.Option(help="Number of classes, used in turn; default: heroes.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File with one prompt a line, used in turn.")] = None,
    reference: Annotated[str, typer.Option(help="heroes, a folder, or an npz (images, or mu and sigma).")] = "heroes",
    network: Annotated[str, typer.Option(help="Feature network: lite0 or inception.")] = "lite0",
    seed: Annotated[int, typer.Option(help="Image i uses seed + i.")] = 0,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for report and runs.")] = None,
    table: Annotated[
        list[Path] | None, typer.Option("--table", help="Print one table of bench.json files instead; repeatable.")
    ] = None,
    device: _common.Device = None,
    dtype: _common.Dtype = "float32",
) -> None:
    """Compare samplers on one model: forwards, seconds, quality.

    \b
    Examples:
      vargen bench -m heroes32-llamagen -s next-token -s jacobi -s jacobi:window=16 -o bench-heroes
      vargen bench -m heroes32-nar --batch 1,8,32 --num 0 -o bench-nar
      vargen bench --table bench-heroes --table bench-nar
    """
    if table:
        from vargen.evaluation.benchmark import bench_table, read_bench

        _common.say("\n".join(bench_table([read_bench(path) for path in table])))
        return
    if out is None:
        raise ValueError("name a folder for the report: --out bench-heroes")
    from vargen.cli.eval import open_network, open_pipeline
    from vargen.evaluation import conditions as given
    from vargen.evaluation.benchmark import bench as run
    from vargen.evaluation.benchmark import bench_page

    _common.check_number("--num", num, 0, given.MAX_IMAGES)
    _common.check_number("--repeats", repeats, 1, 1000)
    _common.check_number("--classes", classes, 1, 10**9)
    sizes = [_common.read_size(text, "a batch size")[0] for text in batch.split(",")]
    if prompts is not None and classes is not None:
        raise ValueError("give either --prompts or --classes, got both")
    chosen, count = None, max(num, *sizes)
    if prompts is not None or classes is not None:
        chosen = (
            given.prompt_file(prompts, count) if prompts is not None else given.class_conditions(classes or 0, count)
        )
    features = open_network(network, None, None, device) if num else network  # times alone need no network
    pipe = open_pipeline(model, None, device, dtype)
    with _common.progress() as progress:
        report = run(
            pipe,
            out,
            samplers=samplers,
            batch_sizes=sizes,
            num=num,
            repeats=repeats,
            conditions=chosen,
            reference=reference,
            network=features,
            seed=seed,
            model=model,
            progress=progress,
        )
    _common.show_markdown(bench_page(report))
    _common.say(f"report: {out / 'bench.md'}")
