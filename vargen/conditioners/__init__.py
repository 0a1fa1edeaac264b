"""From prompts and labels to the condition a backbone reads."""
