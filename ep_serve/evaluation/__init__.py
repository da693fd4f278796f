"""Evaluate the answers of running servers through the OpenAI API.

`make` generates the built-in benchmark, `run` runs a benchmark, `report` writes accuracies, and
`inspect` shows which tokens of a clip are kept.
"""
