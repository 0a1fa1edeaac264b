"""The schedule loop: groups of positions, one forward pass a group."""
