"""A LightningCLI with noise, and the subcommands of ``python -m lightning_noise``."""

from lightning_noise.cli.noise_cli import NoiseCLI

__all__ = ["NoiseCLI"]
