"""ep-serve: audio-visual token reduction inside vLLM."""
