"""What was saved is read without pickle, loads in later versions, or is refused in words and not by half."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import fit, loader, resumes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripts import save_state

from lightning_noise import InputNoise, RobustnessMonitor, noise, report
from lightning_noise.callbacks.base import NoiseCallback

STATES = sorted(save_state.FOLDER.glob("*.ckpt"))
every_state = pytest.mark.parametrize("path", STATES, ids=lambda path: path.stem)


def tuned() -> list[NoiseCallback]:
    return [callback for callback in save_state.callbacks() if isinstance(callback, NoiseCallback) and callback.adaptive]


@resumes
@every_state
@pytest.mark.filterwarnings("ignore:The loaded checkpoint was produced with Lightning")  # the oldest supported Lightning
def test_a_checkpoint_of_each_version_resumes(path):
    saved = torch.load(path, weights_only=True)["callbacks"]
    callbacks: Any = save_state.callbacks()
    fit(callbacks, train=loader(), max_epochs=6, ckpt_path=str(path))
    for callback in (each for each in callbacks if each.adaptive):
        before = saved[callback.state_key]
        kept = callback.adaptive.history[: len(before["history"])]
        assert repr([tuple(decision) for decision in kept]) == repr(before["history"])  # NaN equals NaN
    assert sum(len(each.adaptive.history) for each in callbacks if each.adaptive) == 6


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=5), each, max_size=3),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of each value in nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, each in items for place in places(each, (*path, key))]


def replace(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy in which one value is another, or is missing."""
    changed = copy.deepcopy(value)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    if new is REMOVED:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return changed


REMOVED: Any = object()


def state_of_a_fit() -> dict[str, Any]:
    saved = torch.load(STATES[-1], weights_only=True)["callbacks"]
    return json.loads(json.dumps(saved[tuned()[0].state_key]))


STATE = state_of_a_fit()
fuzzed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)


@pytest.mark.filterwarnings("ignore:the level of 'input' in the checkpoint was moved by")
@fuzzed
@given(index=st.integers(0, 10**6), new=st.just(REMOVED) | JSON)
def test_a_state_that_cannot_be_read_is_refused_in_words_and_not_loaded_by_half(index, new):
    callback = tuned()[0]
    before = repr(callback.state_dict())
    found = places(STATE)
    said = ""
    try:
        callback.load_state_dict(replace(STATE, found[index % len(found)], new))
    except ValueError as error:
        said = str(error)
    if said:
        assert "the checkpoint has no state of the level of 'input' that lightning_noise" in said
        assert repr(callback.state_dict()) == before
    else:
        assert callback.adaptive is not None
        assert callback.adaptive.summary()
        assert callback.adaptive.table()


@fuzzed
@given(state=JSON)
def test_what_is_no_state_is_refused(state):
    with pytest.raises(ValueError, match="the checkpoint has no state of the level of 'input'"):
        tuned()[0].load_state_dict(state)


# --- reports


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    monitor = RobustnessMonitor(noise.Gaussian(), [0.5])
    fit([monitor], max_epochs=1)
    assert monitor.report is not None
    path = report.write(tmp_path_factory.mktemp("report"), monitor.report)
    return json.loads((path.parent / "report.json").read_text())


@fuzzed
@given(index=st.integers(0, 10**6), new=st.just(REMOVED) | JSON)
def test_a_report_that_cannot_be_read_is_refused_in_words(index, new, written, tmp_path):
    whole = {**written, "estimates": written["estimates"][:2]}
    found = places(whole)
    (tmp_path / "report.json").write_text(json.dumps(replace(whole, found[index % len(found)], new)))
    said = ""
    try:
        read = report.read(tmp_path)
    except ValueError as error:
        said = str(error)
    else:
        assert len(read.rows) == len(read.values) <= 2
        assert repr(read)
    assert not said or "report.json is not a report that can be read" in said


@fuzzed
@given(content=st.binary(max_size=50) | st.just(b"[" * 100_000))
def test_what_is_no_report_is_refused(content, tmp_path):
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"report\.json"):
        report.read(tmp_path)


# --- names


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "..", "", "a\0b", "a\nb", "x" * 5000, "C:\\x", "..\\x"])
@pytest.mark.parametrize(
    "make",
    [
        lambda name: InputNoise(noise.Gaussian(), 0.1, name=name),
        lambda name: RobustnessMonitor(noise.Gaussian(), [0.1], name=name),
        lambda name: RobustnessMonitor({name: noise.Gaussian()}, [0.1]),
    ],
    ids=["callback", "monitor", "noise"],
)
def test_a_name_cannot_lead_out_of_the_log_folder(make, name):
    with pytest.raises(ValueError, match="a name must be 1 to 100 printable characters"):
        make(name)


def test_the_package_reads_no_pickles_but_its_own():
    package = Path(report.__file__).parents[1]
    reads = re.compile(r"pickle\.load|torch\.load|weights_only=False")
    reading = {path.name for path in package.rglob("*.py") if reads.search(path.read_text())}
    assert reading == {"testing.py", "returning.py"}  # copies, and what a process wrote for the process that started it
