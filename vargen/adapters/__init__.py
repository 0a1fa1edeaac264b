"""Adapters: models of the transformers library as backbones, with nothing patched.

Needs transformers 5.10 or newer (the cache interface without ``cache_position``); tested with 5.10.1 and 5.23.0.
"""
