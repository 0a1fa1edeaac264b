"""Adapters: models of the transformers library as backbones, with nothing patched."""
