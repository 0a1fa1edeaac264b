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
    "VQTokenizer": "tokenizers.vq.model",
    "MultiScaleVQTokenizer": "tokenizers.multiscale_vq.model",
    "MultiScaleBSQTokenizer": "tokenizers.multiscale_bsq.model",
    "VideoFSQTokenizer": "tokenizers.video_fsq.model",
    "load_kl16": "tokenizers.kl.autoencoder",
    "LlamaGenTransformer": "backbones.llamagen.model",
    "VARTransformer": "backbones.var.model",
    "InfinityTransformer": "backbones.infinity.model",
    "SwittiTransformer": "backbones.switti.model",
    "NARTransformer": "backbones.nar.model",
    "PARTransformer": "backbones.par.model",
    "NBPTransformer": "backbones.nbp.model",
    "AnyOrderTransformer": "backbones.llamagen.any_order",
    "MaskedTransformer": "backbones.llamagen.masked",
    "EagleDrafter": "draft_models.eagle",
    "RowDrafter": "draft_models.row",
    "MARTransformer": "backbones.mar.model",
    "CausalMARTransformer": "backbones.mar.causal",
    "XARTransformer": "backbones.xar.model",
    "NextTokenSampler": "samplers.window.next_token",
    "SpeculativeJacobiSampler": "samplers.window.jacobi",
    "GroupedSpeculativeSampler": "samplers.window.grouped",
    "SpeculativeSampler": "samplers.window.speculative",
    "DraftModelSampler": "samplers.window.draft_model",
    "DraftedJacobiSampler": "samplers.window.drafted_jacobi",
    "LanternSampler": "samplers.window.lantern",
    "NextScaleSampler": "samplers.scale.next_scale",
    "NextCellSampler": "samplers.schedule.next_cell",
    "RowAboveDrafter": "samplers.drafters.row_above",
    "CopyDrafter": "samplers.drafters.copy",
    "NgramDrafter": "samplers.drafters.ngram",
    "TokenRecyclingDrafter": "samplers.drafters.token_recycling",
    "ContinuousMaskedSampler": "samplers.schedule.masked_continuous",
    "ContinuousSpeculativeSampler": "samplers.window.continuous_speculative",
    "ContinuousJacobiSampler": "samplers.window.continuous_jacobi",
    "ZipARSampler": "samplers.schedule.zipar",
    "NeighboringSampler": "samplers.schedule.neighboring",
    "NextBlockSampler": "samplers.schedule.next_block",
    "ParallelGroupSampler": "samplers.schedule.parallel_group",
    "MaskedSampler": "samplers.schedule.masked",
    "DecodeSchedule": "samplers.schedule.schedule",
    "AttributeConditioner": "conditioners.attributes",
    "ClassConditioner": "conditioners.class_labels",
    "T5CaptionConditioner": "conditioners.t5",
    "CLIPCaptionConditioner": "conditioners.clip",
    "load_original": "checkpoints.reader",
    "verify_checkpoint": "checkpoints.verify",
    "convert_checkpoint": "checkpoints.verify",
    "wrap": "adapters.wrap",
    "generate_with": "adapters.generate",
    "LivePreview": "display.preview",
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
