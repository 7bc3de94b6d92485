"""Formulas as MathML, which browsers draw themselves: no script and no other server."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.utils.math import pick_math_environment
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

MISSING = {r"\dots": r"\ldots", r"\bmod": r"\;\text{mod}\;"}  # commands that docutils does not know


def to_mathml(tex: str, as_block: bool = False) -> str:
    """Returns a formula as an element ``math``."""
    for command, known in MISSING.items():
        tex = tex.replace(command, known)
    return tex2mathml(tex, as_block=as_block)


def visit_math(self: Any, node: nodes.math) -> None:
    """Writes a formula within a line."""
    self.body.append(to_mathml(node.astext()))
    raise nodes.SkipNode


def visit_math_block(self: Any, node: nodes.math_block) -> None:
    """Writes a formula on a line of its own."""
    tex = node.astext()
    if "\\\\" in tex and "begin{" not in tex:
        tex = rf"\begin{{{pick_math_environment(tex)}}}{tex}\end{{{pick_math_environment(tex)}}}"
    self.body.append(f'<div class="math">{to_mathml(tex, as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the renderer ``mathml``."""
    app.add_html_math_renderer("mathml", inline_renderers=(visit_math, None), block_renderers=(visit_math_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
