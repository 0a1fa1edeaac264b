"""Layers that tokenizers share."""
