"""The key-value cache and its policies."""
