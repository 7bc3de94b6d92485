"""Reports of robustness: estimates with their intervals, and comparisons of several reports."""

from lightning_noise.report.changes import corruption, corruption_errors, differences, pool
from lightning_noise.report.comparison import Comparison, compare
from lightning_noise.report.files import read, write
from lightning_noise.report.markdown import headline, markdown
from lightning_noise.report.model import Report

__all__ = [
    "Comparison",
    "Report",
    "compare",
    "corruption",
    "corruption_errors",
    "differences",
    "headline",
    "markdown",
    "pool",
    "read",
    "write",
]
