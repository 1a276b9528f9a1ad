"""What processes that SLURM starts learn of each other, and which GPU each of them takes."""

import jax
import pytest
from jax._src import clusters

from cnn_jax.runs import processes

TASK = {
    "SLURM_JOB_ID": "4100",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
}
"""The variables of the third task on the second of two machines."""


@pytest.fixture
def detected(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What JAX makes of the arguments that it is joined with, instead of connecting."""
    found = []

    def initialize(address=None, n=None, number=None, devices=None, **_) -> None:
        detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
        found.append(detect(address, n, number, devices, None, None))

    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    return found


@pytest.mark.parametrize(
    ("visible", "device"),
    [
        ("", 2),  # All GPUs of the machine are visible, as with --gres=gpu:4.
        ("0,1,2,3", 2),
        ("0", 0),  # One is, as with --gpus-per-task=1; its number is 0 for every task,
        ("2", 0),  # or that on the machine, where SLURM does not hide the others.
        ("GPU-8a51c2f4-77d1-4b02-a2b6-6f1e0b9f5a10", 0),
    ],
)
def test_a_task_takes_its_gpu(visible: str, device: int, detected: list, monkeypatch):
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    processes.join(None, None, None)
    port = 65535 - 2**12 + 1 + 4100 % 2**12
    assert detected == [(f"gpu07:{port}", 8, 6, [device])]
