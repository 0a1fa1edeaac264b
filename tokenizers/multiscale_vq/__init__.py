"""Multi-scale VQ tokenizers."""
