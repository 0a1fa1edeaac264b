"""Lumina-mGPT: text to a 768 x 768 picture; the grid and the ends of its lines are forced, so the size is certain.

Weights: Alpha-VLLM/Lumina-mGPT-7B-768 (no licence file; derived from Chameleon, so treat as non-commercial). Pixels need
Chameleon's image tokenizer (`vqgan.ckpt`, Chameleon research licence). Anole's 512 x 512 pictures: --layout fixed --height 32
--width 32 --model leloy/Anole-7b-v0.1-hf; for Anole in Meta's layout (GAIR/Anole-7b-v0.1) see load_meta_chameleon.
"""

import sys
from pathlib import Path

import torch
from common import Checkpoint, arguments, ready, report
from huggingface_hub import snapshot_download
from transformers import AutoProcessor, ChameleonForConditionalGeneration

import vargen
from vargen.adapters.families.chameleon_checkpoints import load_lumina

CHECKPOINT = Checkpoint(
    repo="Alpha-VLLM/Lumina-mGPT-7B-768",
    licence="none given; derived from Chameleon (research, non-commercial)",
    parameters=7.0,
    layers=32,
    kv_heads=32,
    head_dim=128,
    slots=2450,
)
PROMPT = 110  # slots that text and header take, about


def main() -> None:
    """Draw one picture of height x width codes (16 pixels each)."""
    options = arguments(__doc__, height=48, width=48, layout="grid", vq_decoder="vqgan.ckpt", processor="")
    name = ready(CHECKPOINT, options.model, slots=PROMPT + options.height * (options.width + 1))
    if not Path(options.vq_decoder).is_file():
        sys.exit(f"no {options.vq_decoder}: it comes with Chameleon's own weights; give its path as --vq-decoder")
    if options.layout == "grid":
        folder = name if Path(name).is_dir() else snapshot_download(name, local_files_only=True)
        model = load_lumina(folder, options.vq_decoder, dtype=torch.bfloat16, device_map="auto")
    else:
        model = ChameleonForConditionalGeneration.from_pretrained(name, dtype="auto", device_map="auto").eval()
    processor = AutoProcessor.from_pretrained(options.processor or name)  # any of the Chameleon family

    pipe = vargen.ImagePipeline.from_transformers(
        model,
        processor,
        layout=options.layout,
        grid_size=(options.height, options.width),
        vq_decoder=options.vq_decoder,
    )
    with torch.inference_mode():
        output = pipe(options.prompt, seed=options.seed, window=options.window)
    output.images[0].save(options.output)
    report(output, options.output)


if __name__ == "__main__":
    main()
