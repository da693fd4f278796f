"""Media of requests: receiving, deduplicated storage, probing, and URLs for engines."""
