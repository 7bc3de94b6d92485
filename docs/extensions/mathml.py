"""Formulas as MathML, which browsers draw themselves: no script and no other server."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

# operators, which have space around them, in the characters of common fonts
_SIGNS = {"<mi>&#x0007E;</mi>": "<mo>&#x0223C;</mo>", "<mi>&#x029F5;</mi>": "<mo>&#x02216;</mo>"}


def visit_math(self: Any, node: nodes.math) -> None:
    """Writes a formula within a line."""
    self.body.append(_to_mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def visit_math_block(self: Any, node: nodes.math_block) -> None:
    """Writes a formula on a line of its own."""
    self.body.append(f'<div class="math">{_to_mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def _to_mathml(formula: str, display: str) -> str:
    mathml = convert(formula, display=display)
    for found, better in _SIGNS.items():
        mathml = mathml.replace(found, better)
    return mathml


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the renderer ``mathml``."""
    app.add_html_math_renderer("mathml", inline_renderers=(visit_math, None), block_renderers=(visit_math_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
