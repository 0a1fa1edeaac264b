"""What published checkpoints contain: every key with its shape, and parameter counts.

Families of this library are built in; others register a builder.
"""

from vargen.manifests.base import Manifest, VerifyReport
from vargen.manifests.verify import convert_checkpoint, register_manifest, verify_checkpoint

__all__ = ["Manifest", "VerifyReport", "convert_checkpoint", "register_manifest", "verify_checkpoint"]
