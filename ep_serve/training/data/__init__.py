"""Examples: clips as features or tokens, conversations, and the labels of each token."""
