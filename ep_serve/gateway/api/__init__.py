"""HTTP routes of the public API and request validation."""
