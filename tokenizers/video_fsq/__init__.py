"""Video tokenizers with scalar codes."""
