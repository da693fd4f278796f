"""Content-addressed media storage on disk or in an S3 bucket."""
