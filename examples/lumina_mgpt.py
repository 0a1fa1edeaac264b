"""Lumina-mGPT: text to a 768 x 768 picture; the grid and the ends of its lines are forced, so the size is certain.

Weights: Alpha-VLLM/Lumina-mGPT-7B-768 (no licence file; derived from Chameleon, so treat as non-commercial), converted to
the Chameleon class of transformers. Pixels need Chameleon's VQGAN decoder (`vqgan.ckpt`, Chameleon research licence).
With --layout fixed and --model leloy/Anole-7b-v0.1-hf the same script draws Anole's 512 x 512 pictures.
"""

import torch
from common import Checkpoint, arguments, ready, report
from transformers import AutoProcessor, ChameleonForConditionalGeneration

import vargen

CHECKPOINT = Checkpoint(
    repo="Alpha-VLLM/Lumina-mGPT-7B-768",
    licence="none given; derived from Chameleon (research, non-commercial)",
    parameters=7.0,
    layers=32,
    kv_heads=32,
    head_dim=128,
    slots=2450,
)


def main() -> None:
    """Draw one picture of height x width codes (16 pixels each)."""
    options = arguments(__doc__, height=48, width=48, layout="grid", vq_decoder="vqgan.ckpt")
    name = ready(CHECKPOINT, options.model)
    model = ChameleonForConditionalGeneration.from_pretrained(name, dtype="auto", device_map="auto").eval()
    processor = AutoProcessor.from_pretrained(name)

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
