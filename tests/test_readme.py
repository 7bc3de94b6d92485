"""The README and the pages of the documentation show what runs and what exists."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import pytorch_lightning as pl
from torchmetrics import MeanSquaredError

import lightning_noise

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_LINKS = [*PAGES, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"))]
WITH_CODE = [
    pytest.param(page, id=page.stem, marks=() if page.stem == "README" else pytest.mark.slow)
    for page in PAGES
    if "```python" in page.read_text()
]
FAMILIES = ["corruptions", "labels", "masks", "metrics", "noise", "plots", "report", "rules", "schedules", "tasks", "testing"]
REFERENCE = (ROOT / "docs" / "reference.md").read_text()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the code of a page block by block, and returns its names."""

    def run(page: Path) -> dict[str, object]:
        names: dict[str, object] = {}
        for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            exec(compile(code, str(page), "exec"), names)
        return names

    pl.seed_everything(0, verbose=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["main.py"])  # a page may run a LightningCLI
    yield run
    plt.close("all")


# Lightning 2.6 calls what jsonargparse 4.53 deprecates
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_of_a_page_runs_and_trains_a_model_with_skill(page, run):
    trainer = run(page).get("trainer")
    if trainer is not None and re.search(r"callbacks = .*RobustnessMonitor|callbacks=\[.*RobustnessMonitor", page.read_text()):
        assert trainer.callback_metrics["robustness/score"] > 0.5
    else:
        assert page.stem != "README"


def test_only_code_of_other_packages_is_shown_without_being_run():
    not_run = {page.stem for page in PAGES if re.search(r"^```(py|pycon|ipython)$", page.read_text(), re.MULTILINE)}
    assert not_run <= {"coming-from"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_names_that_a_page_mentions_exist(page):
    for family, member in re.findall(rf"(?<![\w/.])({'|'.join(FAMILIES)})\.(\w+)", page.read_text()):
        if member not in ("py", "md", "json"):  # report.json is a file
            assert hasattr(getattr(lightning_noise, family), member), f"{family}.{member}"


@pytest.mark.parametrize("page", WITH_LINKS, ids=lambda page: page.stem)
def test_no_link_of_a_page_is_dead(page):
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)", prose):
        path, _, anchor = link.partition("#")
        if path.startswith(("https:", "http:")):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), link
        assert not anchor or anchor in _anchors(target), link


@pytest.mark.parametrize("page", WITH_LINKS, ids=lambda page: page.stem)
def test_the_files_that_a_page_mentions_exist(page):
    for name in re.findall(r"`([\w.]+/[\w/.]+\.(?:ipynb|toml|txt|md|yaml|py))`", page.read_text()):
        assert _in_repository(name).is_file(), name


def _anchors(page: Path) -> set[str]:
    """Returns the anchors of the headings of a page, as GitHub and the documentation site write them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _in_repository(name: str) -> Path:
    roots = [ROOT, ROOT / "lightning_noise"]
    return next((root / name for root in roots if (root / name).is_file()), ROOT / name)


@pytest.mark.parametrize("family", ["", *FAMILIES])
def test_the_reference_lists_every_public_name(family):
    module = getattr(lightning_noise, family) if family else lightning_noise
    names = {name for name in module.__all__ if name not in FAMILIES and not name.startswith("__")}
    listed = set(re.findall(r"`([\w.]+)`", REFERENCE))
    assert not {name for name in names if not {name, f"{family}.{name}"} & listed}


@pytest.mark.parametrize("page", ["README.md", "docs/coming-from.md"])
def test_the_calls_in_the_right_column_of_a_table_are_right(page):
    names = vars(lightning_noise) | {"metrics": MeanSquaredError()}
    cells = [line.split("|")[2] for line in (ROOT / page).read_text().splitlines() if line.startswith("| ")]
    calls = re.findall(r"`([A-Za-z][\w.]*\(.*?\))`", "".join(cells))
    assert len(calls) > 15
    for call in calls:
        eval(call, dict(names))


def test_the_readme_has_two_commands_that_install():
    # CI runs both on fresh machines
    readme = (ROOT / "README.md").read_text()
    demonstration, tests = re.findall(r"^pip install -c constraints\.txt -e .*$", readme, re.MULTILINE)
    assert demonstration.endswith("&& python -m lightning_noise")
    assert tests.endswith("&& pytest")
