"""Reports of robustness: estimates with their intervals, and their differences to an earlier report."""

from lightning_noise.report.changes import corruption, corruption_errors, differences, pool
from lightning_noise.report.files import read, write
from lightning_noise.report.markdown import headline, markdown
from lightning_noise.report.model import Report

__all__ = ["Report", "corruption", "corruption_errors", "differences", "headline", "markdown", "pool", "read", "write"]
