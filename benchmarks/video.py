"""Next-block beside next-frame and next-token decoding: frames a second of one clip size, in turns, in one run.

Three models of one width and depth over one tokenizer; they differ in the block that a forward pass draws: one code, one row,
one frame. Size and sampler are those of the shipped heroes-video-nbp. Weights are random, the heads sharpened until a code
holds as many nats as a trained one does: noise takes most of the time on a CPU, and a sure code needs none (`--flat` leaves them as they
are). Seconds hold drawing the codes and decoding them to frames, as in the paper's table.

    python benchmarks/video.py                # about three minutes on one core
    python benchmarks/video.py --device cuda
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from _common import interleaved_medians, pin_to_core, report, table, write_json

from vargen.backbones.nbp.model import NBPTransformer
from vargen.registry import MODELS_FOLDER
from vargen.samplers.schedule.next_block import NextBlockSampler
from vargen.tokenizers.video_fsq.model import VideoFSQTokenizer

SHIPPED = MODELS_FOLDER / "heroes-video-nbp"
SMALL: dict[str, Any] = {
    "dim": 192,
    "num_layers": 6,
    "num_heads": 4,
    "codebook_size": 4096,
    "grid_size": (5, 8, 8),
    "condition_type": "attributes",
    "num_condition_tokens": 12,
    "num_attributes": 300,
    "max_positions": None,
    "code_rank": 32,
}
SMALL_TOKENIZER: dict[str, Any] = {
    "base_channels": 128,
    "channel_multipliers": (1,),
    "temporal_downsample": (),
    "num_mid_blocks": 0,
    "levels": (8, 8, 8, 8),
    "norm_num_groups": 1,
    "factorized": True,
    "patch_size": (4, 4, 4),
    "refine_channels": 16,
}
BATCHES = (1, 4)
NATS = 0.02  # a code of the shipped model, on held-out clips


def blocks(grid_size: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The schedules: sides of what one pass draws."""
    _, height, width = grid_size
    return {"next-token": (1, 1, 1), "next-block (row)": (1, 1, width), "next-frame": (1, height, width)}


@torch.no_grad()
def sharpen(model: NBPTransformer, nats: float) -> None:
    """Scale the head until the mean entropy of a code is ``nats``."""
    codes = torch.randint(model.codebook_size, (1, model.num_codes), device=model.device)
    logits = model(codes, torch.zeros(1, model.num_condition_tokens - 1, dtype=torch.int64, device=model.device))
    low, high = 1.0, 2.0**20
    for _ in range(20):
        factor = (low * high) ** 0.5
        law = (logits * factor).log_softmax(-1)
        low, high = (factor, high) if -(law.exp() * law).sum(-1).mean() > nats else (low, factor)
    model.head.weight *= low


def make_models(tiny: bool, flat: bool, device: str) -> tuple[dict[str, Any], Any]:
    """One backbone a schedule, and the tokenizer they share."""
    config, tokenizer_config = dict(SMALL), dict(SMALL_TOKENIZER)
    if tiny:
        config |= {"dim": 32, "num_layers": 2, "codebook_size": 64, "grid_size": (2, 4, 4), "code_rank": None}
        tokenizer_config |= {"base_channels": 16, "levels": (8, 8), "num_res_blocks": 1}
    elif SHIPPED.is_dir():
        config = plain(NBPTransformer.load_config(SHIPPED / "backbone"))
        tokenizer_config = plain(VideoFSQTokenizer.load_config(SHIPPED / "tokenizer"))
    torch.manual_seed(0)
    tokenizer = VideoFSQTokenizer(**tokenizer_config).eval().requires_grad_(False).to(device)
    grid = tuple(config["grid_size"])
    models = {
        name: NBPTransformer(**{**config, "block": block}).eval().requires_grad_(False).to(device)
        for name, block in blocks(grid).items()
    }
    for model in () if flat else models.values():
        sharpen(model, NATS)
    return models, tokenizer


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments of a stored configuration."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def shipped_sampler() -> NextBlockSampler:
    """The settings of the shipped model."""
    folder = SHIPPED / "sampler"
    return NextBlockSampler.from_pretrained(folder) if folder.is_dir() else NextBlockSampler(top_p=0.95)


def measure(
    models: dict[str, Any], tokenizer: Any, sampler: NextBlockSampler, batch: int, repeats: int, device: str
) -> list[dict[str, Any]]:
    """Seconds of one batch with every schedule, in turns; next-token is the reference."""
    forwards: dict[str, int] = {}
    decode_seconds: list[float] = []
    clock = time.process_time if device == "cpu" else time.perf_counter  # one thread: other processes do not count

    def runner(name: str) -> Callable[[], None]:
        model = models[name]
        condition = torch.zeros(batch, model.num_condition_tokens - 1, dtype=torch.int64, device=device)

        def run() -> None:
            out = sampler.sample(model, condition, seeds=range(batch))
            forwards[name] = out.stats.num_forwards
            start = clock()
            tokenizer.decode(out.codes.unflatten(1, model.grid_size))
            if device != "cpu":
                torch.cuda.synchronize()
            decode_seconds.append(clock() - start)

        return run

    with torch.no_grad():
        seconds = interleaved_medians({name: runner(name) for name in models}, repeats, clock)
    frames = tokenizer.num_frames(next(iter(models.values())).grid_size[0])
    return [
        {
            "schedule": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "batch": batch,
            "forwards": forwards[name],
            "seconds": seconds[name],
            "of these decoding": sorted(decode_seconds)[len(decode_seconds) // 2],
            "frames/s": batch * frames / seconds[name],
            "speed-up": seconds["next-token"] / seconds[name],
        }
        for name, model in models.items()
    ]


def main() -> None:
    """Measure, print a table, write `results/video.json`, with `_flat` and `_cuda` where asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a very small size, to see that it works")
    parser.add_argument("--flat", action="store_true", help="heads as they are drawn: every code needs noise")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="write nothing")
    options = parser.parse_args()
    if options.device == "cpu":
        pin_to_core(options.core)
    models, tokenizer = make_models(options.tiny, options.flat, options.device)
    first = next(iter(models.values()))
    sampler = shipped_sampler()
    shared = (options.repeats, options.device)
    rows = [row for batch in options.batches for row in measure(models, tokenizer, sampler, batch, *shared)]
    print(table(rows))
    if not options.dry:
        size = {"grid": list(first.grid_size), "dim": first.hidden_size, "layers": len(first.layers)}
        settings = {name: value for name, value in sampler.config.items() if not name.startswith("_")}
        facts = {
            "shipped_size": SHIPPED.is_dir() and not options.tiny,
            "nats_per_code": None if options.flat else NATS,
        }
        content = report(**facts, sampler=settings, **size, rows=rows)
        print(write_json("video" + "_flat" * options.flat + "_cuda" * (options.device == "cuda"), content))


if __name__ == "__main__":
    main()
