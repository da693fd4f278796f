"""Training loops, their state on disk, and the final examination."""
