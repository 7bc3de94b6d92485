"""Perturbation of batches, of what modules return, and of weights."""
