"""What `make demo` runs: a server with the embedded model, a clip, and what the reduction does.

The model lies here too: a checkpoint of 7 MB that was trained on clips of this project's making.
"""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
"""Directory of the embedded model; its README.md is the model card."""
