"""Which proposals become permanent: one rule a file."""
