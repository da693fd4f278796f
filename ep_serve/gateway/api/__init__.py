"""The routes that clients call, and the checks of their requests."""
