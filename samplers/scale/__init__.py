"""The scale loop: next-scale prediction."""
