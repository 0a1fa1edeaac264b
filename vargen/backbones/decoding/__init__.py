"""Sessions: how samplers run a backbone."""
