"""Chameleon, Anole and Lumina-mGPT (arXiv:2405.09818, 2407.06135, 2408.02657): one body, two streams of codes.

``layout="fixed"`` (Chameleon, Anole): a fixed number of codes, then end of image. ``layout="grid"`` (Lumina-mGPT): the
prompt names the grid, every row ends with a token. The stock class overwrites the logits of all image tokens in its
``forward``; the adapter calls body and head itself and so reads them. The stock class has no pixel decoder: give the
decoder's weights (taming layout, ``decoder.*``) as ``vq_decoder``. Checkpoints in other layouts: chameleon_checkpoints.py.

A prompt of Chameleon's may hold images. Then a third branch reads the prompt without its text, and the guided logits are
``u + s_i (i - u) + s (c - i)``, with s the sampler's guidance_scale and s_i the adapter's image_guidance_scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vargen.adapters.base import TransformersBackbone
from vargen.adapters.family import name_ids
from vargen.adapters.layouts import fill, lines
from vargen.adapters.pixels import TamingPixels
from vargen.adapters.prompts import PackedPrompts, pack
from vargen.protocols import Layout

LAYOUTS = ("fixed", "grid")
CELL = 2  # codes along a side of one unit of Lumina's grid tokens (32 pixels)
LUMINA_PROMPT = "Generate an image of {width}x{height} according to the following prompt:\n{text}"


class ChameleonBackbone(TransformersBackbone):
    """``ChameleonForConditionalGeneration``; see ``TransformersBackbone``.

    Args:
        layout: ``"fixed"`` or ``"grid"``, by the checkpoint.
        vq_decoder: weights of the pixel decoder, a path or a state dict; None = codes only.
        image_guidance_scale: s_i, for prompts with images (``"fixed"`` only).
        visible_end_of_turn: keep the prompt's last token in Lumina's unconditional row, as the batched variant of
            speculative Jacobi decoding does (arXiv:2410.01699).
    """

    model_types = ("chameleon",)
    guidance_scale = 3.0
    default_grid = (32, 32)  # 512 x 512 pixels

    def __init__(
        self,
        model: nn.Module,
        processor: Any = None,
        *,
        layout: str = "fixed",
        vq_decoder: str | Path | Mapping[str, Tensor] | None = None,
        image_guidance_scale: float = 1.2,
        visible_end_of_turn: bool = False,
        **options: Any,
    ) -> None:
        if layout not in LAYOUTS:
            raise ValueError(
                f"layout must be 'fixed' (Chameleon, Anole) or 'grid' (Lumina-mGPT), got {layout!r}; the checkpoint "
                "decides, its config does not tell"
            )
        self.form = layout
        super().__init__(model, processor, **options)
        self.visible_end_of_turn, self.vq_decoder = visible_end_of_turn, vq_decoder
        self.image_guidance_scale = image_guidance_scale
        names = ["<s>", "<racm3:break>", "<eoss>", "<reserved08706>", "<reserved08799>"]
        self.bos, self.boi, self.eoi, self.end_of_turn, self.eol = name_ids(self.config.vocabulary_map, names)
        # the authors sample Anole with temperature 0.7 and top-p 0.9, Lumina with top-k 2000
        self.temperature, self.top_p, self.top_k = (0.7, 0.9, 0) if layout == "fixed" else (1.0, 1.0, 2000)

    @property
    def body(self) -> nn.Module:
        """The model below its head."""
        return self.model.model

    @property
    def head(self) -> nn.Module:
        """Head over the whole vocabulary, image tokens untouched."""
        return self.model.lm_head

    def code_ids(self) -> Tensor:
        """[V] token ids by name, ``IMGIMG...Z`` with A-J for 0-9."""
        return self.model.model.vocabulary_mapping.img2bpe_mapping_tensor.long()

    def layout(self, height: int | None = None, width: int | None = None) -> Layout:
        """The stream behind begin-of-image (and the two grid tokens)."""
        size = self._check_grid((height or self.grid_size[0], width or self.grid_size[1]))
        if self.form == "fixed":
            return lines(size, tail=(self.eoi,))
        return lines(size, eol=self.eol, tail=(self.eol, self.eoi))

    def to_stream(self, codes: Tensor) -> Tensor:
        """Codes [B, N] as token ids with ends of lines and end of image."""
        ids = self._ids()
        assert ids is not None
        return fill(self.layout(), codes, ids)

    @property
    def header(self) -> list[int]:
        """Tokens between the prompt and the first code."""
        if self.form == "fixed":
            return [self.boi]
        names = [f"<reserved{8800 + side // CELL:05d}>" for side in self.grid_size]
        return [self.boi, *name_ids(self.config.vocabulary_map, names)]

    def unconditional(self, rows: list[Tensor]) -> list[Tensor]:
        """Chameleon: BOS and begin-of-image. Lumina: the header alone, without BOS."""
        if self.form == "fixed":
            row = [self.bos, self.boi]
        else:
            row = [self.end_of_turn] * self.visible_end_of_turn + self.header
        return [torch.tensor(row)] * len(rows)

    def token_rows(self, prompts: Any) -> list[Tensor]:
        """Put codes of images in the place of the processor's placeholders; a prompt that ends its turn gets the header.

        Raises:
            ValueError: images without placeholders or the reverse.
        """
        pixels = prompts.get("pixel_values") if isinstance(prompts, Mapping) else None
        if pixels is not None:
            ids = torch.as_tensor(prompts["input_ids"])
            holes = ids == int(self.config.vocabulary_map["<image>"])
            tokens = self.model.model.get_image_tokens(pixels)
            if int(holes.sum()) != tokens.numel():
                raise ValueError(
                    f"the prompts have room for {int(holes.sum())} image tokens, the images are {tokens.numel()}; give "
                    "texts and images to one call of the processor"
                )
            prompts = {**prompts, "input_ids": ids.masked_scatter(holes, tokens.to(ids))}
        rows, header = super().token_rows(prompts), torch.tensor(self.header)
        return [torch.cat([row, header.to(row)]) if int(row[-1]) == self.end_of_turn else row for row in rows]

    def pack_guided(self, rows: list[Tensor], others: list[Tensor], guidance_scale: float | Tensor) -> PackedPrompts:
        """With images in a prompt: text and images, images, neither; mixed so that guidance of two gives all three."""
        ids = self._ids()
        assert ids is not None
        if self.form == "grid" or not any(bool(torch.isin(row, ids.to(row)).any()) for row in rows):
            return super().pack_guided(rows, others, guidance_scale)
        scales = torch.as_tensor(guidance_scale)
        if scales.numel() != 1:
            raise ValueError("prompts with images take one guidance_scale for the whole batch")
        kept = torch.cat([ids.cpu(), torch.tensor([self.bos, self.boi, self.eoi])])
        images = [row[torch.isin(row, kept.to(row))] for row in rows]
        # u' + s (c - u') = u + s_i (i - u) + s (c - i)  where  u' = m u + (1 - m) i
        mix = (1 - self.image_guidance_scale) / (1 - float(scales))
        return pack([rows, images, others], self.device, mix)

    def check_prompts(self, rows: list[Tensor], given: Any) -> None:
        """A prompt ends with the header of this grid."""
        header = self.header
        for i, row in enumerate(rows):
            if row[-len(header) :].tolist() != header:
                what = "begin-of-image" if self.form == "fixed" else "begin-of-image and the two grid tokens"
                raise ValueError(
                    f"prompt {i} must end with {what}, {header}, got {row[-len(header) :].tolist()}; give the prompt "
                    "as text, or append backbone.header"
                )

    def encode_text(self, texts: list[str]) -> list[Tensor]:
        """BOS, text, end of turn, header."""
        h, w = self.grid_size
        if self.form == "grid":
            side = 2 ** (len(self.config.vq_config.channel_multiplier) - 1)
            texts = [LUMINA_PROMPT.format(width=w * side, height=h * side, text=text) for text in texts]
        rows = []
        for text in texts:
            ids = [int(token) for token in self.processor.tokenizer(text)["input_ids"]]
            ids = [self.bos] * (ids[:1] != [self.bos]) + ids
            rows.append(torch.tensor([*ids, self.end_of_turn, *self.header]))
        return rows

    def pixels(self) -> nn.Module | None:
        """The taming decoder whose weights were given, behind the model's own codebook."""
        if self.vq_decoder is None:
            return None
        vq = self.model.model.vqmodel
        return TamingPixels(vq.quantize.embedding, vq.post_quant_conv, self.vq_decoder)

    def _check_grid(self, grid_size: tuple[int, int]) -> tuple[int, int]:
        size = super()._check_grid(grid_size)
        if self.form == "grid" and (size[0] % CELL or size[1] % CELL):
            raise ValueError(f"Lumina-mGPT's grids have even sides (units of 32 pixels), got {size}")
        return size
