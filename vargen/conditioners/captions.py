"""Cleaning of web captions, as DeepFloyd IF, PixArt and LlamaGen do it before tokenising."""

from __future__ import annotations

from importlib.util import find_spec

from vargen.validation.extras import install


def clean_caption(text: str) -> str:
    """Clean twice, as those models were trained (the second pass catches what unescaping uncovers).

    Lower case; links, mark-up, nicknames, CJK characters, file names, codes and shop phrases removed; dashes, quotes
    and punctuation unified; broken encodings mended.

    Raises:
        ImportError: ftfy, beautifulsoup4 or transformers is missing.
        ValueError: mark-up that cannot be read.
    """
    missing = [name for name in ("transformers", "ftfy", "bs4") if find_spec(name) is None]
    if missing:
        raise ImportError(f"cleaning captions needs {', '.join(missing)}; {install('transformers')}")
    from bs4 import ParserRejectedMarkup
    from diffusers import PixArtAlphaPipeline

    # the method reads one class attribute of its pipeline, no instance is needed
    clean = PixArtAlphaPipeline._clean_caption
    try:
        return clean(PixArtAlphaPipeline, clean(PixArtAlphaPipeline, text))
    except ParserRejectedMarkup:
        raise ValueError("a caption holds mark-up that cannot be read, such as '<!['; write it without") from None
