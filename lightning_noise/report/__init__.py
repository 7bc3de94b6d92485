"""Reports of robustness: estimates with their intervals, and their differences to an earlier report."""

from lightning_noise.report.model import corruption, corruption_errors, differences, make, markdown, read, values_of, write

__all__ = ["corruption", "corruption_errors", "differences", "make", "markdown", "read", "values_of", "write"]
