"""Training: a small model that really answers, from nothing, and real checkpoints from a JSONL.

It stands beside the engine, on the same rooms: layouts, rotary embedding, sieves and processors are
those that serve. Neither the engine nor the gateway knows of it.
"""
