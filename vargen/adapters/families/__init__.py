"""One adapter a model family."""
