"""Verification of windows: reference, Triton kernels, public functions."""
