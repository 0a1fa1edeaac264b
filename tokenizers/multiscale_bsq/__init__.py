"""Binary multi-scale tokenizers."""
