"""Runs that torchrun and Ray start on two processes go on after one of them was killed, as if nothing had happened."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from scripts import cluster

ROOT = Path(__file__).parents[1]


def assert_equal_ends(killed: Path, whole: Path) -> None:
    one, two = (torch.load(folder / "end.pt") for folder in (killed, whole))
    assert one["world_size"] == two["world_size"] == 2
    assert all(map(torch.equal, one["weights"], two["weights"]))
    assert repr(one["moves"]) == repr(two["moves"])  # NaN equals NaN
    assert all(one["moves"])


def spare(folder: Path) -> Path:
    """A folder in which no process will be killed."""
    folder.mkdir()
    (folder / "killed").touch()
    return folder


@pytest.mark.slow
def test_torchrun_starts_a_killed_run_again_which_ends_as_the_uninterrupted_one(tmp_path):
    killed, whole = tmp_path / "killed", spare(tmp_path / "whole")
    killed.mkdir()
    for folder in (killed, whole):
        options = ["--nproc-per-node=2", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
        command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "scripts.cluster", str(folder)]
        paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
        # in the store of torchrun itself, processes that start again may find the addresses of those that were killed
        variables = {**os.environ, "PYTHONPATH": paths, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
    assert_equal_ends(killed, whole)


# --- Ray


def ray_loop(config: dict[str, str]) -> None:
    """What each worker runs."""
    train, integration = import_module("ray.train"), import_module("ray.train.lightning")
    report = integration.RayTrainReportCallback()
    settings = {"devices": "auto", "strategy": integration.RayDDPStrategy(), "plugins": [integration.RayLightningEnvironment()]}
    folder, checkpoint = Path(config["folder"]), train.get_checkpoint()
    path = None if checkpoint is None else str(Path(checkpoint.to_directory(), report.CHECKPOINT_NAME))
    (folder / ("began" if path is None else "resumed")).touch()
    cluster.fit(folder, ckpt_path=path, more=[report], **settings)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of Ray are its own
def test_ray_starts_a_killed_run_again_which_ends_as_the_uninterrupted_one(tmp_path):
    ray = pytest.importorskip("ray", reason="ray is not installed; make ray installs it")
    train, starter = import_module("ray.train"), import_module("ray.train.torch")
    killed, whole = tmp_path / "killed", spare(tmp_path / "whole")
    killed.mkdir()
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    ray.init(num_cpus=3, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}})
    try:
        for folder in (killed, whole):
            again = train.FailureConfig(max_failures=1)
            settings = {
                "scaling_config": train.ScalingConfig(num_workers=2),
                "run_config": train.RunConfig(name="run", storage_path=str(folder / "ray"), failure_config=again),
            }
            starter.TorchTrainer(ray_loop, train_loop_config={"folder": str(folder)}, **settings).fit()
    finally:
        ray.shutdown()
    assert (killed / "resumed").exists()
    assert not (whole / "resumed").exists()
    assert_equal_ends(killed, whole)
