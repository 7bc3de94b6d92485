"""Modules import downward, and private names of other libraries stay in one module."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "lightning_noise"
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}

# lowest first; a module may import from its own layer and from lower layers
LAYERS = [
    ("loop.internals", "_version", "_checks", "_tensor", "_usage"),
    ("noise", "masks", "labels", "schedules", "rules", "rng", "batch", "patterns"),
    ("perturb", "losses", "metrics", "tasks"),
    ("loop",),
    ("evaluation", "report", "plots", "corruptions"),
    ("callbacks",),
    ("testing", "cli", "demo", "__main__", "__init__"),
]
# an edge that goes upward, with the reason
UPWARD: dict[tuple[str, str], str] = {}
# whose run may need Lightning
LIGHTNING = ("loop", "evaluation.engine", "callbacks", "cli", "demo")
# module and attribute, with the reason
PRIVATE: dict[tuple[str, str], str] = {
    ("_tensor", "_C"): "torch documents DisableTorchFunctionSubclass, and no other name keeps a subclass out of a call",
}
# names of objects of other libraries, of which a private attribute is never ours even if we have one of that name
FOREIGN = {"trainer", "module", "pl_module", "torch", "strategy", "optimizer", "parameter", "tensor", "logger"}


def imports(name: str) -> set[str]:
    """The package modules that a module imports, under TYPE_CHECKING, too."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning_noise":
            base = (node.module or "").removeprefix("lightning_noise").strip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".strip(".")
                found.add(inner if inner in FILES or f"{inner}.__init__" in FILES else base or "__init__")
        elif isinstance(node, ast.Import):
            ours = [alias.name for alias in node.names if alias.name.startswith("lightning_noise.")]
            found |= {name.removeprefix("lightning_noise.") for name in ours}
    return {module if module in FILES else f"{module}.__init__" for module in found} - {name}


def layer(name: str) -> int:
    matches = [
        (len(part), i) for i, parts in enumerate(LAYERS) for part in parts if name == part or name.startswith(f"{part}.")
    ]
    assert matches, f"{name} is in no layer"
    return max(matches)[1]


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_module_imports_from_its_layer_and_below(name):
    upward = {module for module in imports(name) if layer(module) > layer(name)}
    assert {(name, module) for module in upward} <= UPWARD.keys()


def test_no_module_imports_itself_through_others():
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in finished:
            for module in sorted(imports(name)):
                visit(module, (*path, name))
            finished.add(name)

    for name in FILES:
        visit(name, ())


@pytest.mark.parametrize("name", sorted(FILES))
def test_lightning_is_imported_at_run_time_only_where_a_trainer_is_at_hand(name):
    hidden = {
        id(child)
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    found = [
        ast.unparse(node)
        for node in ast.walk(TREES[name])
        if id(node) not in hidden
        and isinstance(node, ast.Import | ast.ImportFrom)
        and any(
            module.split(".")[0] in ("pytorch_lightning", "lightning", "lightning_fabric")
            for module in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        )
    ]
    assert not found or name.startswith(LIGHTNING)


@cache
def own_names() -> set[str]:
    """The private names that the package itself defines: functions, classes and attributes."""
    found = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value):
                found.add(node.attr)
    return found


def is_own(value: ast.expr) -> bool:
    return (isinstance(value, ast.Name) and value.id in ("self", "cls")) or ast.unparse(value) == "super()"


def private_accesses(tree: ast.AST, own: set[str]) -> set[str]:
    """The private attributes of other objects that a tree reads or writes and the package does not define."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and not is_own(node.value)
        and (node.attr not in own or ast.unparse(node.value).split(".")[-1] in FOREIGN)
    }


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"loop.internals"}))
def test_private_attributes_of_others_are_named_in_one_module(name):
    named_tuple = {"_replace", "_fields", "_make", "_asdict"}  # documented, in spite of their names
    found = private_accesses(TREES[name], own_names() | named_tuple)
    assert {(name, attribute) for attribute in found} <= PRIVATE.keys()


def test_the_walk_finds_private_attributes():
    own = own_names()
    assert private_accesses(ast.parse("trainer._results.x"), own) == {"_results"}
    assert private_accesses(ast.parse("vars(module._modules)"), own) == {"_modules"}
    assert private_accesses(ast.parse("torch._foreach_copy_(a, b)"), own) == {"_foreach_copy_"}
    assert not private_accesses(ast.parse("self._results"), own)
    assert private_accesses(TREES["loop.internals"], own)
