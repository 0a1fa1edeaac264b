"""MAR, bidirectional and causal."""
