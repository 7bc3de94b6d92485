"""The subcommands of ``python -m lightning_noise``."""
