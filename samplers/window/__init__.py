"""The window loop: propose, score in one forward pass, decide, commit."""
