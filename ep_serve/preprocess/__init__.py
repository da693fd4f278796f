"""From decoded media to what the towers read."""
