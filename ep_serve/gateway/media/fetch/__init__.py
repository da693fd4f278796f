"""Fetching media from URLs that clients name."""
