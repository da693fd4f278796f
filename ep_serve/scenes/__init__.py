"""Synthetic clips with known answers, and questions about them. Does not import torch."""
