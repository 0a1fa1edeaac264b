"""Pixel heroes."""
