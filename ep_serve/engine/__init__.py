"""What runs inside vLLM: processor, model, refiner, worker part, statistics."""
