"""Judges of the package that others wrote."""
