"""What comes from outside is checked here, once, before anything is imported or allocated."""
