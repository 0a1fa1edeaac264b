"""Moving heroes."""
