"""Probing media in helper processes: format, size and duration, without decoding."""
