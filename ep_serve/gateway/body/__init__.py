"""Request body parsing with bounds on size, memory and time."""
