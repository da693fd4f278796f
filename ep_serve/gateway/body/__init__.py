"""Reading request bodies inside bounds of size, memory and time."""
