"""`/playground`: a page to try models by hand, and to see what was kept of a clip."""
