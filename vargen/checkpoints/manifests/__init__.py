"""What published checkpoints contain: every key with its shape, and parameter counts."""
