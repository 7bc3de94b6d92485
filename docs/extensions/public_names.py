"""Links to public names: from code font, and from the modules in which a name is defined."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

PACKAGE = "lightning_noise"
FAMILIES = ["labels", "masks", "metrics", "noise", "plots", "report", "rules", "schedules", "tasks", "testing"]
MODULES = [PACKAGE, *(f"{PACKAGE}.{family}" for family in [*FAMILIES, "metrics.collections"])]


def public_names() -> dict[str, Any]:
    """Returns every public object by the name that users import."""
    found = {}
    for module in map(importlib.import_module, MODULES):
        members = {name: getattr(module, name) for name in module.__all__ if name != "__version__"}
        found |= {f"{module.__name__}.{name}": value for name, value in members.items() if not hasattr(value, "__path__")}
    return {name: value for name, value in found.items() if name not in MODULES}


NAMES = public_names()
DEFINED = {f"{value.__module__}.{value.__qualname__}": name for name, value in NAMES.items() if hasattr(value, "__qualname__")}
_BARE = Counter(name.rpartition(".")[2] for name in NAMES)
WRITTEN = {name.removeprefix(f"{PACKAGE}."): name for name in NAMES} | {
    bare: name for name in NAMES if _BARE[bare := name.rpartition(".")[2]] == 1 and bare[0].isupper()
}


class LinkPublicNames(SphinxTransform):
    """Makes a link of each public name, or call of one, in code font."""

    default_priority = 400

    def apply(self, **kwargs: Any) -> None:
        for literal in list(self.document.findall(nodes.literal)):
            written = re.match(r"([A-Za-z_][\w.]*)(\(.*\))?$", literal.astext(), re.DOTALL)
            name = WRITTEN.get(written[1].removeprefix(f"{PACKAGE}.")) if written else None
            if name and not isinstance(literal.parent, nodes.reference | nodes.title | pending_xref):
                link = pending_xref("", refdomain="py", reftype="obj", reftarget=name, refexplicit=True, refwarn=True)
                literal.replace_self(link)
                link += literal


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element) -> nodes.Element | None:
    """Resolves a name of the module that defines it, or a name without its module."""
    if node.get("refdomain") != "py":
        return None
    target, domain = node["reftarget"], env.get_domain("py")
    name = DEFINED.get(target)
    if name is None:
        (name, *others) = [name for name, *_ in domain.get_objects() if name.endswith(f".{target}")] or [target]
        name = target if others else name
    return None if name == target else domain.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, content)


def skip_private(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leaves out members of a module that are not in its ``__all__``; the others come in the order of the source."""
    module = getattr(obj, "__module__", "")
    return True if what == "module" and module in MODULES and f"{module}.{name}" not in NAMES else None


def check_complete(app: Sphinx, env: BuildEnvironment) -> None:
    """Warns of public names that no page describes."""
    described = {name for name, *_ in env.get_domain("py").get_objects()}
    for name in sorted(NAMES.keys() - described):
        logging.getLogger(__name__).warning("no page of docs/api describes %s", name)


def setup(app: Sphinx) -> dict[str, bool]:
    """Adds the transform, the resolver and the check."""
    app.add_transform(LinkPublicNames)
    app.connect("autodoc-skip-member", skip_private)
    app.connect("missing-reference", resolve)
    app.connect("env-check-consistency", check_complete)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
