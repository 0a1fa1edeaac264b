"""Emu3.5: text to a picture of about one megapixel; its body is Qwen3's, so no remote code runs.

Weights: BAAI/Emu3.5-Image and, for pixels, BAAI/Emu3.5-VisionTokenizer; both Apache-2.0. The tokenizer needs the
repository's own tokenizer files (Qwen tiktoken with added tokens).
"""

from pathlib import Path

import torch
from common import Checkpoint, arguments, ready, report
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer

import vargen
from vargen.adapters.families.emu3_5 import load_emu35

CHECKPOINT = Checkpoint(
    repo="BAAI/Emu3.5-Image", licence="Apache-2.0", parameters=34.1, layers=64, kv_heads=8, head_dim=128, slots=4300
)
PROMPT = 110  # slots that text and header take, about


def main() -> None:
    """Draw one picture of height x width codes (16 pixels each)."""
    options = arguments(__doc__, height=55, width=73, vq_decoder="", tokenizer="")
    name = ready(CHECKPOINT, options.model, slots=PROMPT + options.height * (options.width + 1))
    folder = name if Path(name).is_dir() else snapshot_download(name, local_files_only=True)
    model = load_emu35(folder, dtype=torch.bfloat16, device_map="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or folder, trust_remote_code=True)

    pipe = vargen.ImagePipeline.from_transformers(
        model,
        tokenizer,
        family="emu3.5",
        grid_size=(options.height, options.width),
        vq_decoder=options.vq_decoder or None,
    )
    kind = "pil" if options.vq_decoder else "codes"
    with torch.inference_mode():
        output = pipe(options.prompt, seed=options.seed, window=options.window, output_type=kind)
    if output.images:
        output.images[0].save(options.output)
    report(output, options.output if output.images else "codes only (give --vq-decoder for pixels)")


if __name__ == "__main__":
    main()
