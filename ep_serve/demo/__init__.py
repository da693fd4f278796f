"""`make demo`: serve the embedded model and compare answers and costs over keep ratios.

It includes the model: a checkpoint of 7 MB, trained on synthetic clips.
"""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
"""Directory of the embedded model; its README.md is the model card."""
