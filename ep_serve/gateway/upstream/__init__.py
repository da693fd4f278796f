"""Engines: which gets a request, the connections to them, and the relay of their answers."""
