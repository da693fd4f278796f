"""What `make demo` runs: a server, a clip with sound, and what the reduction does to it."""
