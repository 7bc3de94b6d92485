"""A use of the installed wheel, run by `make wheel` in an environment without the checkout."""

import sys
from importlib.resources import files
from pathlib import Path

import lightning_noise

assert Path(lightning_noise.__file__).is_relative_to(sys.prefix), lightning_noise.__file__
assert files("lightning_noise").joinpath("py.typed").is_file()
callback = lightning_noise.InputNoise(lightning_noise.noise.Gaussian(), lightning_noise.schedules.Linear(0.0, 0.5))
print("imported", lightning_noise.__version__, callback.name)
