"""`vargen convert`: an official checkpoint into a folder for `from_pretrained`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from vargen.cli import _common

_ARGUMENTS = {"key", "overwrite"}


@_common.one_line_errors
def convert(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="Checkpoint file, or folder, in the official layout.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer checkpoint: writes a whole pipeline instead of one model.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="Entry of a training container, such as ema.")] = None,
    num_heads: Annotated[int | None, typer.Option(help="Attention heads, where shapes cannot tell.")] = None,
    grid_size: Annotated[str | None, typer.Option(help="Codes, rows x columns, such as 16x16.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Another setting of the model; repeatable.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
) -> None:
    """Convert an official checkpoint into a folder for from_pretrained. Never runs code from the file.

    \b
    Examples:
      vargen convert vq_ds16_c2i.pt vq16
      vargen convert c2i_B_256.pt llamagen-b --tokenizer vq_ds16_c2i.pt --grid-size 16
      vargen convert Emu3-Gen emu3-hf --tokenizer Emu3-VisionTokenizer
      vargen generate -m llamagen-b --class-label 207 -g 4 --top-k 2000
    """
    config = _common.read_settings(settings or [])
    if num_heads is not None:
        config["num_heads"] = num_heads
    if grid_size is not None:
        config["grid_size"] = _common.read_size(grid_size, "--grid-size")
    _common.check_output(folder, overwrite=overwrite, folder=True)
    for name in _ARGUMENTS & config.keys():
        raise ValueError(f"{name} has an option of its own: --{name}")
    try:
        if tokenizer is not None and _is_emu3(checkpoint, key):
            config["vision_tokenizer"], tokenizer = str(tokenizer), None
        if tokenizer is None:
            from vargen.checkpoints.verify import convert_checkpoint

            convert_checkpoint(checkpoint, folder, key=key, overwrite=overwrite, **config)
        else:
            _convert_pipeline(checkpoint, tokenizer, folder, key, overwrite, config)
    except ValueError as error:
        raise ValueError(as_options(str(error))) from error
    _common.say(f"written to {folder}")


def _is_emu3(checkpoint: Path, key: str | None) -> bool:
    """Whether the tokenizer belongs into the model itself."""
    from vargen.checkpoints.folders import family_of
    from vargen.checkpoints.reader import load_original

    family = family_of(checkpoint, load_original(checkpoint, key=key))
    return family is not None and family.name == "emu3-original"


def as_options(message: str) -> str:
    """Name options of this command where a message names arguments of Python: ``pass num_heads=...``."""

    def option(match: re.Match[str]) -> str:
        name = match[1]
        own = {"num_heads": "--num-heads N", "grid_size": "--grid-size ROWSxCOLUMNS", "key": "--key NAME"}
        return f"{match[0].split()[0]} {own.get(name, f'--set {name}=VALUE')}"

    # a value is dots, or stands in brackets or quotes, or ends with the word
    return re.sub(r"\b(?:pass|give|say) (\w+)=(?:\([^)]*\)|\"[^\"]*\"|\.{3}|[\w.]+)", option, message)


def _convert_pipeline(
    checkpoint: Path, tokenizer: Path, folder: Path, key: str | None, overwrite: bool, config: dict[str, Any]
) -> None:
    import vargen
    from vargen.checkpoints.families import guess_family
    from vargen.checkpoints.reader import load_original
    from vargen.files import atomic_dir

    state_dict = load_original(checkpoint, key=key)
    family = guess_family(state_dict)
    if family is None or not family.loader.endswith("Transformer") or family.loader not in vargen.__all__:
        found = f"looks like a {family.title}" if family else "is of no known family"
        raise ValueError(f"{checkpoint} {found}; a pipeline needs a transformer that vargen loads")
    backbone = getattr(vargen, family.loader).from_original(state_dict, **config)
    pipe = vargen.ImagePipeline(
        tokenizer=vargen.VQTokenizer.from_original(tokenizer),
        backbone=backbone,
        sampler=vargen.SpeculativeJacobiSampler(),
    )
    with atomic_dir(folder, overwrite=overwrite) as beside:
        pipe.save_pretrained(beside)
