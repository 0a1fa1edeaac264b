"""Token heads: from rows of a backbone to tokens."""
