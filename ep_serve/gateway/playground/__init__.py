"""The web page `/playground`, to try models and inspect the kept tokens of a clip."""
