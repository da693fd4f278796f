"""Train the embedded model from scratch, and fine-tune real checkpoints on a JSONL file.

Layouts, rotary embedding, sieves and processors are those of serving. Neither the engine nor the
gateway imports this package.
"""
