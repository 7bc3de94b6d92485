"""Each callback and monitor under each condition of one process."""

from __future__ import annotations

import pytest
import torch

from matrix.cells import REFUSED, check, outcome
from matrix.columns import COLUMNS
from matrix.conditions import ONE_PROCESS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Lightning's and torch's words on the conditions
]


@pytest.fixture(autouse=True)
def _compile_anew():
    torch.compiler.reset()


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("name", ONE_PROCESS)
def test_a_callback_works_or_is_refused(name, column):
    if "peft" in name:
        pytest.importorskip("peft")
    if error := REFUSED.get((name, column)):
        assert outcome(ONE_PROCESS[name], column) == error
    else:
        check(ONE_PROCESS[name], column)
