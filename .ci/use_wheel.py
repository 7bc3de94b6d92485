"""A use of the installed wheel, run by `make wheel` in an environment without the checkout."""

import os
import re
import sys
import tempfile
from importlib.metadata import metadata
from importlib.resources import files
from pathlib import Path

import lightning_noise
from lightning_noise.__main__ import main

assert Path(lightning_noise.__file__).is_relative_to(sys.prefix), lightning_noise.__file__
assert files("lightning_noise").joinpath("py.typed").is_file()

description = metadata("lightning_noise")["Description"]
assert "pip install" in description
assert not re.findall(r"\]\((?!https?:)", description), "the description links to a file"

os.chdir(tempfile.mkdtemp())
main(["--epochs", "1"])
print("used", lightning_noise.__version__)
