"""Runs on disk: their reports, and which of them are trainings of one recipe."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from lightning_noise.report.files import read
from lightning_noise.report.model import FILE, Report

__all__ = ["Recipe", "check_trainings", "find_recipes", "read_trainings"]

_HYPERPARAMETERS = "hparams.yaml"
_STAGES = ("test", "validate")  # the folders of the reports of `trainer.test` and `trainer.validate`
# what the reports of trainings of one recipe have in common
_SAME = ("task", "n", "n_targets", "n_draws", "seed", "noises", "levels", "sizes")
_SEPARATELY = "compare them as runs of their own: type python -m lightning_noise compare"


class Recipe(NamedTuple):
    """One or more trainings that differ in their seeds alone.

    Attributes:
        name: The name.
        files: The ``report.json`` of each training.
        is_named: Whether the user wrote which trainings belong to the recipe.
    """

    name: str
    files: tuple[Path, ...]
    is_named: bool = False


class _Run(NamedTuple):
    """A training: its folder, and its reports by their folders in it. The place of a report that was given is empty."""

    folder: Path
    reports: dict[str, Path]


class _Argument(NamedTuple):
    name: str
    path: Path
    runs: list[_Run]


def find_recipes(runs: Sequence[str], baseline: str | None = None) -> tuple[list[Recipe], str]:
    """Returns the recipes that the arguments of a comparison name, and the place of their reports in the folder of a run.

    An argument is a file, a folder, a pattern, or ``NAME=RUN,RUN``. A folder with several runs is a recipe, and the runs are
    its trainings. A single folder stands for the folders in it. The reports are those of ``trainer.test`` if every run has one.
    A baseline is a further run, and comes first.

    Raises:
        ValueError: There is no report, or the runs do not have a report at the same place.
    """
    arguments = [argument for run in runs for argument in _find(run)]
    if len(arguments) == 1 and not arguments[0].name and len(arguments[0].runs) > 1:
        arguments = _children(arguments[0].runs)
    if baseline is not None:
        arguments = [*_find(baseline), *arguments]
    place = _choose_place([run for argument in arguments for run in argument.runs])
    names = _short_names([argument.path for argument in arguments])
    recipes: dict[tuple[Path, ...], Recipe] = {}
    for argument, name in zip(arguments, names, strict=True):
        files = tuple(run.reports.get("") or run.reports[place] for run in argument.runs)
        # the first of equals: `logs/plain logs/*` names a folder twice
        recipes.setdefault(files, Recipe(argument.name or name, files, bool(argument.name)))
    return list(recipes.values()), place


def read_trainings(recipe: Recipe) -> list[Report]:
    """Reads the reports of a recipe.

    Raises:
        ValueError: The evaluations of the trainings differ, or hyperparameters that are not seeds.
    """
    reports = [read(file) for file in recipe.files]
    check_trainings(recipe.name, reports, [str(file.parent) for file in recipe.files])
    if not recipe.is_named:
        _check_hyperparameters(recipe)
    return reports


def check_trainings(name: str, reports: Sequence[Report], labels: Sequence[str]) -> None:
    """Raises a ValueError if the reports cannot be those of trainings of one recipe."""
    for report, label in zip(reports[1:], labels[1:], strict=True):
        for field in _SAME:
            ours, first = getattr(report, field), getattr(reports[0], field)
            if ours != first:
                raise ValueError(
                    f"the trainings of {name!r} were evaluated in different ways: {field} is {first} in {labels[0]} and "
                    f"{ours} in {label}; {_SEPARATELY} {labels[0]} {label}"
                )
        if str(report.estimates) == str(reports[0].estimates):
            raise ValueError(
                f"{labels[0]} and {label} have the same values to the last digit: they are one training, and not two seeds of "
                f"{name!r}. Leave one out, or call pl.seed_everything with another seed and train again"
            )


def _check_hyperparameters(recipe: Recipe) -> None:
    """Raises a ValueError if the logged hyperparameters of the trainings differ in more than seeds."""
    folders = [next((path for path in file.parents[:3] if (path / _HYPERPARAMETERS).is_file()), None) for file in recipe.files]
    known = {str(folder): _read_lines(folder / _HYPERPARAMETERS) for folder in folders if folder is not None}
    first = next(iter(known), "")
    for folder, lines in known.items():
        differing = [line for line in lines if line not in known[first]]
        differing += [line for line in known[first] if line not in lines]
        if differing:
            files = ",".join(str(folder) for folder in folders if folder is not None)
            raise ValueError(
                f"{first} and {folder} are not two seeds of one recipe: their {_HYPERPARAMETERS} differ in "
                f"{' and '.join(map(repr, differing[:4]))}. {_SEPARATELY.capitalize()} {' '.join(known)}; if they "
                f"still are one recipe, type {recipe.name}={files}"
            )


def _read_lines(file: Path) -> list[str]:
    lines = map(str.strip, file.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not re.match(r"\S*(seed|random_state)\S*:", line)]


def _find(argument: str) -> Iterator[_Argument]:
    name, _, rest = argument.partition("=")
    if matches := _match(argument):
        yield from (_Argument("", path.parent if path.is_file() else path, _find_runs(path)) for path in matches)
    elif rest:
        paths = [path for part in rest.split(",") for path in _match(part) or [Path(part)]]
        yield _Argument(name, paths[0], [run for path in paths for run in _find_runs(path)])
    else:
        _find_runs(Path(argument))  # raises the error


def _match(pattern: str) -> list[Path]:
    if os.path.exists(pattern):
        return [Path(pattern)]
    return sorted(map(Path, glob.glob(pattern, recursive=True)), key=_natural)


def _find_runs(path: Path) -> list[_Run]:
    if path.is_file() or (path / FILE).is_file():
        return [_Run(path.parent, {"": path}) if path.is_file() else _Run(path, {"": path / FILE})]
    runs: dict[Path, _Run] = {}
    for file in sorted(path.rglob(FILE), key=_natural):
        above = file.parent.parent
        folder = above.parent if above.name in _STAGES else above
        runs.setdefault(folder, _Run(folder, {})).reports[file.parent.relative_to(folder).as_posix()] = file
    if not runs:
        raise ValueError(_describe_absence(path))
    return list(runs.values())


def _describe_absence(path: Path) -> str:
    if not path.exists():
        found = sorted(each.name for each in path.parent.iterdir()) if path.parent.is_dir() else []
        there = f"; {path.parent} has {_enumerate(found)}" if found else ""
        return f"there is no file or folder {str(path)!r}{there}"
    found = sorted(each.relative_to(path).as_posix() for each in path.rglob("*") if each.is_file())
    return (
        f"no {FILE} in {str(path)!r}, which has {_enumerate(found) or 'no files'}. A RobustnessMonitor writes it at the end of "
        "a fit, a validation or a test: type Trainer(callbacks=[RobustnessMonitor()]) and train or test again"
    )


def _enumerate(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _children(runs: Sequence[_Run]) -> list[_Argument]:
    """Returns the folders of the runs below the folder that they share."""
    top = Path(os.path.commonpath([run.folder for run in runs]))
    children: dict[Path, _Argument] = {}
    for run in runs:
        path = top.joinpath(*run.folder.relative_to(top).parts[:1])
        children.setdefault(path, _Argument("", path, [])).runs.append(run)
    return list(children.values())


def _choose_place(runs: Sequence[_Run]) -> str:
    """Returns where every run has a report: that of a test if there is one."""
    found = {run.folder: list(run.reports) for run in runs if "" not in run.reports}
    common = [place for place in next(iter(found.values()), [""]) if all(place in places for places in found.values())]
    if not common:
        places = "; ".join(f"{folder} has {_enumerate(places)}" for folder, places in found.items())
        raise ValueError(f"the runs have no report at the same place: {places}. Run trainer.test in each, or give the folders")
    return min(common, key=lambda place: (*(not place.startswith(f"{stage}/") for stage in _STAGES), place))


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Returns what differs between the paths."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    shortest = min(map(len, parts)) - 1  # a part is left of each

    def same(columns: Iterator[tuple[str, ...]]) -> int:
        return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))

    start = min(same(zip(*parts, strict=False)), shortest)
    end = min(same(zip(*(each[::-1] for each in parts), strict=False)), shortest - start) if len(set(parts)) > 1 else 0
    return ["/".join(each[start : len(each) - end]) for each in parts]


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """Returns a key that sorts version_10 after version_9."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", str(path))]
