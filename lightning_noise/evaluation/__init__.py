"""Evaluation of a model under noise on held-out data."""
