"""Losses of smoothed, noisy and mixed labels."""
