"""Multimodal input in the API process: from URLs to one fused item and a reduced prompt."""
