"""Names that the API process and the worker share; free of imports, so that both may read it."""

from __future__ import annotations

REPORT_METHOD = "reduction_report"
SELECTION_METHOD = "selection_report"
"""The worker methods that the API process calls."""
