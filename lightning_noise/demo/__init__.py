"""The demonstration, ``python -m lightning_noise``."""
