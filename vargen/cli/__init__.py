"""The `vargen` command."""
