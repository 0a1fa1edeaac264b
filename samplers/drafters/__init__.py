"""Who proposes codes: one drafter a file."""
