"""Configuration of the documentation site; ``make site`` builds the pages in build/site."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy.typing

# signatures show the name, and not the union of ten types that it stands for
numpy.typing.ArrayLike = type("ArrayLike", (), {"__module__": "numpy.typing"})  # pyright: ignore

import lightning_noise  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "lightning_noise"
author = "The lightning_noise developers"
project_copyright = author
version = release = lightning_noise.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "mathml",
    "noise_cards",
    "public_names",
]
nitpicky = True
# names of other packages, whose inventories would need a network
OTHERS = "Lightning(Data)?Module|Trainer|collections|matplotlib|numpy|os|pandas|pathlib|torch|torchmetrics"
nitpick_ignore_regex = [("py:.*", rf"({OTHERS})(\..*)?")]

autodoc_class_signature = "mixed"
autodoc_inherit_docstrings = False  # the hooks of Lightning are described by Lightning
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"lightning_noise {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
pygments_style, pygments_dark_style = "default", "github-dark"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
