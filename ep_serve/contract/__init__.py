"""What clients may send and how far it is bounded; engine and gateway read the same tables."""
