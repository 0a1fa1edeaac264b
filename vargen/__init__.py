"""Visual autoregressive generation: tokenizers, backbones and samplers that plug into one another.

Public names are imported on first use (PEP 562), so that ``import vargen`` stays light: it pulls in neither triton
nor diffusers nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_here = Path(__file__).parent
if not (_here / "tokenizers").is_dir():  # a checkout on a file system without symbolic links
    __path__.append(str(_here.parent))

# public name -> module below vargen that defines it; the only list, read by the documentation and by the tests
_names = {
    "ImagePipeline": "pipelines.image",
    "VideoPipeline": "pipelines.video",
    "VQTokenizer": "tokenizers.vq",
    "MultiScaleVQTokenizer": "tokenizers.multiscale_vq",
    "VideoFSQTokenizer": "tokenizers.video_fsq",
    "load_kl16": "tokenizers.kl",
    "LlamaGenTransformer": "backbones.llamagen",
    "VARTransformer": "backbones.var",
    "NARTransformer": "backbones.nar",
    "PARTransformer": "backbones.par",
    "NBPTransformer": "backbones.nbp",
    "AnyOrderTransformer": "backbones.any_order",
    "MaskedTransformer": "backbones.masked",
    "EagleDrafter": "backbones.eagle",
    "MARTransformer": "backbones.mar",
    "CausalMARTransformer": "backbones.causal_mar",
    "XARTransformer": "backbones.xar",
    "NextTokenSampler": "samplers.next_token",
    "SpeculativeJacobiSampler": "samplers.jacobi",
    "GroupedSpeculativeSampler": "samplers.grouped",
    "DraftModelSampler": "samplers.draft_model",
    "DraftedJacobiSampler": "samplers.drafted_jacobi",
    "LanternSampler": "samplers.lantern",
    "NextScaleSampler": "samplers.next_scale",
    "NextCellSampler": "samplers.next_cell",
    "ContinuousMaskedSampler": "samplers.masked_continuous",
    "ContinuousSpeculativeSampler": "samplers.continuous_speculative",
    "ZipARSampler": "samplers.zipar",
    "NeighboringSampler": "samplers.neighboring",
    "NextBlockSampler": "samplers.next_block",
    "ParallelGroupSampler": "samplers.parallel_group",
    "MaskedSampler": "samplers.masked",
    "DecodeSchedule": "samplers.schedule",
    "AttributeConditioner": "conditioners.attributes",
    "ClassConditioner": "conditioners.class_labels",
    "T5CaptionConditioner": "conditioners.t5",
    "load_original": "hub",
    "verify_checkpoint": "hub",
    "convert_checkpoint": "hub",
    "wrap": "adapters.wrap",
    "generate_with": "adapters.generate",
    "LivePreview": "preview",
    "ImagePipelineOutput": "pipelines.outputs",
    "VideoPipelineOutput": "pipelines.video_frames",
    "SamplerOutput": "outputs",
    "DecodeStats": "outputs",
}

__all__ = ["__version__", *_names]


def __getattr__(name: str) -> Any:
    if name not in _names:
        raise AttributeError(f"module 'vargen' has no attribute {name!r}")
    value = getattr(import_module(f"vargen.{_names[name]}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_names])
