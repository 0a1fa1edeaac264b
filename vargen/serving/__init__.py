"""Pages and services over a pipeline."""
