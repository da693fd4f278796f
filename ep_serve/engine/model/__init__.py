"""The model on a worker: towers, refiner, rotary embedding and the sieve between them."""
