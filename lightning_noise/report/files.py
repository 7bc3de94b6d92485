"""Reports as files: JSON for comparisons, Markdown for people."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from lightning_noise._checks import check_numbers
from lightning_noise._version import __version__
from lightning_noise.evaluation.conditions import Condition
from lightning_noise.evaluation.results import Estimate
from lightning_noise.report.markdown import markdown
from lightning_noise.report.model import FILE, NUMBERS, Report

__all__ = ["read", "write"]

_REQUIRED = [field.name for field in fields(Report) if field.default is MISSING and field.default_factory is MISSING]
_KINDS: dict[str, type] = {"task": str, "version": str} | dict.fromkeys(
    ["n", "n_draws", "n_targets", "n_trainings", "seed"], int
)
_KINDS |= dict.fromkeys(["noises", "levels", "units"], dict) | dict.fromkeys(["shared", "sizes", "estimates"], list)
_REPORT = "a report.json that a RobustnessMonitor has written"


def write(folder: str | Path, report: Report, baseline: Report | None = None) -> Path:
    """Writes ``report.json``, which can be a baseline later, and ``report.md`` for people.

    Numbers that are not finite become null in the JSON file.

    Returns:
        The path of ``report.md``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(_to_json(report), encoding="utf-8")
    path = folder / "report.md"
    path.write_text(markdown(report, baseline), encoding="utf-8")
    return path


def read(path: str | Path) -> Report:
    """Reads a report from ``report.json`` or its folder. Null becomes NaN.

    Raises:
        ValueError: There is no file, or the file is not a report.
    """
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"no report at {path}; give {_REPORT}, or its folder")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{file} is not JSON ({error}); give {_REPORT}") from error
    found = found if isinstance(found, dict) else {}
    missing = [name for name in _REQUIRED if name not in found]
    try:
        if missing:
            raise KeyError(*missing)
        return _to_report(found)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:  # other fields, or fields of other types
        lacks = f"it lacks {list(error.args)}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        by = f" It is by lightning_noise {found['version']}; this is {__version__}." if "version" in found else ""
        raise ValueError(f"{file} is not a report that can be read: {lacks}.{by} Give {_REPORT}") from error


def _to_report(found: Mapping[str, Any]) -> Report:
    known = {name: found[name] for name in Report.__dataclass_fields__ if name in found}  # a later version may have more
    for name, kind in _KINDS.items():
        _check_kind(name, known.get(name, kind()), kind)
    return Report(
        **known
        | {
            "levels": {name: tuple(map(_nan, levels)) for name, levels in found["levels"].items()},
            "shared": tuple(map(str, found["shared"])),
            "sizes": tuple(map(int, found["sizes"])),
            "chance": None if found.get("chance") is None else _nan(found["chance"]),
            "estimates": tuple(map(_from_json, found["estimates"])),
        }
    )


def _to_json(report: Report) -> str:
    """Returns the report with an estimate in each line."""
    about = {name: getattr(report, name) for name in Report.__dataclass_fields__ if name != "estimates"}
    about["chance"] = None if report.chance is None else _null(report.chance)
    rows = [
        {"noise": each.condition.noise, "level": each.condition.level, "metric": each.metric}
        | {name: _null(getattr(each, name)) for name in NUMBERS}
        | {"without": [_null(value) for value in each.without]}
        for each in report.estimates
    ]
    lines = ",\n  ".join(json.dumps(row, allow_nan=False) for row in rows)  # with `indent`, json would encode in Python
    return f'{json.dumps(about, indent=1)[:-2]},\n "estimates": [\n  {lines}\n ]\n}}\n'


def _check_kind(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}")


def _from_json(row: Mapping[str, Any]) -> Estimate:
    for name in ("noise", "metric"):
        _check_kind(name, row[name], str)
    check_numbers(level=row["level"])
    numbers = {name: _nan(row[name]) for name in NUMBERS}
    without = tuple(_nan(value) for value in row["without"])
    return Estimate(Condition(row["noise"], row["level"]), row["metric"], **numbers, without=without)


def _null(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _nan(value: float | None) -> float:
    check_numbers(number=value)
    return math.nan if value is None else float(value)
