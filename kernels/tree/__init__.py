"""Verification of trees: Triton kernel and public function."""
