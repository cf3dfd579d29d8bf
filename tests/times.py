"""What two runs of the same configuration may differ in."""

TIMES = (
    "seconds",
    "cpu_seconds",
    "train_seconds",
    "curvature_seconds",
    "total_seconds",
    "tuning_overhead",
    "final_fit_overhead",
)
"""Names of figures that are times."""
