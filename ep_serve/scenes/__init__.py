"""Synthetic clips whose right answers are known, and questions about them. Free of torch."""
