"""Models trained to draft for another."""
