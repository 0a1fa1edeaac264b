"""The vocabulary of Emu3 as its authors publish it, as a tokenizer and a processor of transformers.

``emu3.tiktoken`` holds a line "base64 rank" for every piece of text; special tokens follow in the order below, then the lines of
``emu3_vision_tokens.txt``: wrapper, begin and end of image, and a name for every code.
"""

from __future__ import annotations

import base64
import binascii
from itertools import pairwise
from pathlib import Path
from typing import Any

from vargen.adapters.families.emu3_layout import CODE, TOKENS
from vargen.validation.printable import shown
from vargen.validation.reading import read_text

PIECES, VISION = "emu3.tiktoken", "emu3_vision_tokens.txt"
MAX_PIECES = 2**18
MAX_PIECE = 256  # bytes; the longest published one has 128
EXTRAS = 205
# pieces of text between which nothing merges; digits stand alone
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
IMAGE = "<image>"  # transformers' placeholder for a picture to look at; it takes the place of an unused special token
SPECIAL = {
    "image_token": IMAGE,
    "boi_token": "<|image start|>",
    "eoi_token": "<|image end|>",
    "image_wrapper_token": "<|image token|>",
    "eof_token": "<|extra_201|>",
}
CHAT = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] + ('.' if m['role'] == 'user' else '') }}{% endfor %}"
    "{{ ' ' }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def emu3_processor(path: str | Path) -> Any:
    """The processor over the vocabulary in a folder (or beside a file); None where ``emu3.tiktoken`` is not there.

    Raises:
        ValueError: one of its two files is missing or damaged.
    """
    from transformers import Emu3ImageProcessor, Emu3Processor, PreTrainedTokenizerFast

    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if not (folder / PIECES).is_file():
        return None
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=read_vocabulary(folder),
        bos_token="<|extra_203|>",
        eos_token="<|extra_204|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens=SPECIAL,
    )
    return Emu3Processor(Emu3ImageProcessor(), tokenizer, chat_template=CHAT)


def check_vocabulary(processor: Any, names: dict[str, int], folder: str | Path) -> None:
    """Raise ``ValueError`` where the tokenizer gives a token another id than the model."""
    words = processor.tokenizer
    codes = [name for name in names if name not in TOKENS]
    for name in (*TOKENS, codes[0], codes[-1]):
        if words.convert_tokens_to_ids(name) != names[name]:
            found = words.convert_tokens_to_ids(name)
            raise ValueError(
                f"{folder}: {name} is token {found} of {PIECES} and {names[name]} of the model; is it its own?"
            )


def read_vocabulary(folder: Path) -> Any:
    """A ``tokenizers.Tokenizer`` of the two files; ids are ranks, then the special tokens in their order.

    Raises:
        ValueError: a line that is none, pieces that are not made of shorter ones, ranks with holes.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    ranks = read_pieces(folder / PIECES)
    letters = _byte_letters()
    text = {piece: "".join(letters[byte] for byte in piece) for piece in ranks}
    pairs = [_parts(piece, ranks) for piece in ranks if len(piece) > 1]
    words = Tokenizer(
        models.BPE({text[piece]: rank for piece, rank in ranks.items()}, [(text[a], text[b]) for a, b in pairs])
    )
    words.normalizer = normalizers.NFC()
    pieces = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    words.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(False, use_regex=False)])
    words.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", IMAGE, *(f"<|extra_{i}|>" for i in range(1, EXTRAS))]
    special += read_text(folder / VISION).splitlines()
    if CODE.format(0) not in special or len(set(special)) != len(special) or not all(special):
        raise ValueError(f"{folder / VISION} must hold a name a line, {CODE.format(0)} among them and none twice")
    words.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return words


def read_pieces(file: Path) -> dict[bytes, int]:
    """Pieces of text as bytes -> rank, in the order of ranks.

    Raises:
        ValueError: a line that is none; a byte without a piece; ranks that are not 0, 1, 2, ...
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_text(file).splitlines()):
        piece, _, rank = line.partition(" ")
        try:
            found = base64.b64decode(piece, validate=True)
        except (binascii.Error, ValueError):
            found = b""
        if not 0 < len(found) <= MAX_PIECE or rank != str(number) or found in ranks or number >= MAX_PIECES:
            raise ValueError(
                f"{file}: line {number + 1} must be a new piece in base64 and {number}, got {shown(line)}"
            )
        ranks[found] = number
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise ValueError(f"{file} lacks the piece of byte {missing}; download it again")
    return ranks


def _parts(piece: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two pieces that were merged into this one: what is left when all merges before it are done."""
    parts = [bytes([byte]) for byte in piece]
    while len(parts) > 2:
        found = [(ranks.get(a + b, MAX_PIECES), i) for i, (a, b) in enumerate(pairwise(parts))]
        rank, i = min(found)
        if rank >= ranks[piece]:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    if len(parts) != 2:
        raise ValueError(
            f"{PIECES}: the piece of rank {ranks[piece]} is not made of two earlier ones; download it again"
        )
    return parts[0], parts[1]


def _byte_letters() -> list[str]:
    """A printable letter for every byte, as byte-level vocabularies write them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]
