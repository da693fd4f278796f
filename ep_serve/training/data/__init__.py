"""Training data: clips as features or tokens, conversations, and per-token labels."""
