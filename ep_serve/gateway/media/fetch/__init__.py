"""Fetch media from client URLs with SSRF protection."""
