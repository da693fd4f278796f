"""Training loops, their checkpointed state, and the final evaluation."""
