"""VQ tokenizers."""
