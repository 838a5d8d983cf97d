"""Which implementation runs where, what is refused, and what the report says of it."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from tiny_models import adapted
from torch import nn

from dlor_peft.kernels import choice, eager, reference, report, update
from dlor_peft.kernels.launch import MAX_RANK

HAS_TRITON = find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
x = torch.randn(3, 4)


@pytest.fixture
def ask(monkeypatch):
    return lambda name: monkeypatch.setattr(choice, "requested", name)


@pytest.mark.parametrize(("name", "module"), [("auto", eager), ("torch", eager), ("reference", reference)])
def test_what_runs_on_a_cpu(name, module, ask):
    ask(name)
    assert choice.implementation(x, 8) is module


@pytest.mark.parametrize(("name", "module"), [("torch", eager), ("reference", reference)])
def test_what_is_asked_for_is_what_computes(name, module, ask, monkeypatch):
    ask(name)
    calls = []
    mul = module.mul
    monkeypatch.setattr(module, "mul", lambda *args: calls.append(1) or mul(*args))
    update(x, x, torch.ones(4))
    assert calls


@needs_triton
def test_triton_that_cannot_run_is_an_error_and_says_what_to_do(ask, monkeypatch):
    ask("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"DLOR_KERNELS=triton, but Triton runs on CUDA devices.*Set it to auto"):
        update(x, x, torch.ones(4))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        choice.implementation(x.double(), 8)
    with pytest.raises(ValueError, match=f"ranks to {MAX_RANK}.*not {MAX_RANK + 1}"):
        choice.implementation(x, MAX_RANK + 1)


def test_triton_that_is_not_installed_is_an_import_error(ask, monkeypatch):
    ask("triton")
    monkeypatch.setattr(choice, "_has_triton", lambda: False)
    with pytest.raises(ImportError, match="DLOR_KERNELS=triton, but Triton is not installed"):
        update(x, x, torch.ones(4))


def test_auto_takes_triton_only_where_it_was_measured(ask, monkeypatch):
    ask("auto")
    monkeypatch.setattr(choice, "_has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr(choice, "MEASURED", frozenset({(9, 0)}))
    assert choice._obstacle("cuda", 0, torch.bfloat16, 16) is None
    assert "not torch.float64" in choice._obstacle("cuda", 0, torch.float64, 16)
    monkeypatch.setattr(choice, "MEASURED", frozenset({(8, 0)}))
    assert "gpu_check.py" in choice._obstacle("cuda", 0, torch.bfloat16, 16)


def test_the_environment_is_read_and_an_unknown_value_refused():
    code = "from dlor_peft.kernels import choice; print(choice.requested)"
    for value, expected in (("reference", "reference"), ("fast", "'fast' is none of auto, triton, torch, reference")):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "DLOR_KERNELS": value},
            capture_output=True,
            text=True,
            check=False,
        )
        assert expected in (run.stderr if value == "fast" else run.stdout)
        assert (run.returncode != 0) == (value == "fast")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("auto", "cpu, torch.bfloat16: torch: the kernels are for GPUs"),
        ("torch", "cpu, torch.bfloat16: torch, asked for"),
        pytest.param("triton", "cpu, torch.bfloat16: an error: Triton runs on CUDA devices", marks=needs_triton),
    ],
)
def test_the_report_says_what_runs_and_why(name, line, ask, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    ask(name)
    lines = report().splitlines()
    assert lines[0] == f"DLOR_KERNELS={name}"
    assert any(one.startswith(line) for one in lines)
    assert "cpu, order: frozen product first" in lines


def test_the_report_on_a_model_counts_how_its_layers_run():
    model = adapted("llama")
    hooked = next(m for m in model.modules() if isinstance(m, nn.Linear))
    hooked.register_forward_hook(lambda *args: None)
    fused, called = report(model).splitlines()[-2:]
    assert fused.endswith("layers: Linear: update and frozen product are one operation")
    assert called.startswith("1 layers: Linear: the base layer is called")
    assert "hooked" in called
