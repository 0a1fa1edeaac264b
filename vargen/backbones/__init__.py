"""Autoregressive backbones and the one cached forward under them."""
