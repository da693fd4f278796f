"""Media on their way to an engine: received, stored once, probed, and lent out."""
