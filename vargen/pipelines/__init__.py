"""One diffusers-style call."""
