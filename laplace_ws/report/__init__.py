"""One HTML page about a training run: what the tuned prior precision bought over the fixed ones."""

from __future__ import annotations

from laplace_ws.report.page import write_report
from laplace_ws.report.records import EpochRecord, ModelSummary, ReportInputError, RunRecord, load_run

__all__ = ["EpochRecord", "ModelSummary", "ReportInputError", "RunRecord", "load_run", "write_report"]
