"""Evaluation: questions about clips, asked through the API of servers that already run.

What is measured is what users get: nothing here looks inside a server. `make` writes this project's
own benchmark, `run` asks any, `report` and `inspect` show what came of it.
"""
