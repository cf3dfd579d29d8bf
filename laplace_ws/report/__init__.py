"""One HTML page about a training run: what the tuned prior precision bought over the fixed ones."""

from __future__ import annotations

from laplace_ws.report.plots import PLOTS, Plot, Section
from laplace_ws.report.records import RunRecord, load_run
from laplace_ws.report.run_page import write_report

__all__ = ["PLOTS", "Plot", "RunRecord", "Section", "load_run", "write_report"]
