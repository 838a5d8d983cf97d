"""FSDP2, FSDP1, DDP and tensor parallelism, over gloo in two processes; what they check is in sharded_cases.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_cases
import torch
from tiny_models import adapted, inputs, logits
from torch import nn

TIMEOUT = 240


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """Case -> what went wrong, by process, after one run of all of them."""
    folder = tmp_path_factory.mktemp("sharded")
    tests = Path(sharded_cases.__file__).parent
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")]),
    }
    logs = [(folder / f"log-{rank}").open("w+") for rank in range(sharded_cases.NUM_PROCESSES)]
    processes = [
        subprocess.Popen(
            [sys.executable, sharded_cases.__file__, str(rank), str(folder)], env=environment, stdout=log, stderr=log
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for log in logs:
            log.close()
    assert codes == [0] * len(processes), (folder / "log-0").read_text()[-2000:]
    reports = [json.loads((folder / f"failures-{rank}.json").read_text()) for rank in range(len(processes))]
    return {name: [report.get(name) for report in reports] for name in sharded_cases.cases(folder)}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("case", sharded_cases.cases(Path()))
def test_two_processes(case, failures):
    assert failures[case] == [None] * sharded_cases.NUM_PROCESSES, "\n".join(filter(None, failures[case]))


def test_data_parallel_on_the_cpu_is_the_model_itself():
    model = adapted("llama", "scaled-both")
    with torch.no_grad():
        got = nn.DataParallel(model)(**inputs("llama")).logits
    assert torch.equal(got, logits(model, "llama"))
