"""Media on disk or in a bucket, by their SHA-256."""
