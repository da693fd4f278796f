"""The API server: `ep-serve serve`, vLLM's configuration, and the changes to vLLM's server."""
