"""Quality metrics over torchmetrics."""
