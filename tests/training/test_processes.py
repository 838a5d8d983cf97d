"""How one of several processes ends."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

RANK = """
import os, sys, torch, torch.distributed as dist
from dlor_peft.training import processes, signals

processes.PATIENCE = 0.1

def work():
    dist.init_process_group("gloo")
    group = dist.new_group([0, 1])
    ones = torch.ones(1000)
    for _ in range(5):
        dist.all_reduce(ones)
        dist.all_reduce(ones, group=group)
    raise signals.StoppedError() if sys.argv[1] == "stopped" else ValueError(sys.argv[1])

def report(error):
    if str(error) == "unexpected":
        raise error
    return 130 if sys.argv[1] == "stopped" else 2

sys.exit(processes.run_one(work, report))
"""


@pytest.mark.parametrize(
    ("end", "code", "last"),
    [("stopped", 130, ""), ("known", 2, ""), ("unexpected", 1, "[rank0]: ValueError: unexpected\n")],
)
def test_every_end_has_its_exit_code(monkeypatch, end, code, last):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in {"WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    ranks = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        command = [sys.executable, "-c", RANK, end]
        ranks.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    texts = [process.communicate(timeout=240)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [code, code], texts
    assert texts[0].endswith(last)
