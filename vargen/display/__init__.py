"""Results to look at: in notebooks, while they grow, as plots."""
