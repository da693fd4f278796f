"""Probe media in a sandboxed process: format, size and duration, without decoding."""
