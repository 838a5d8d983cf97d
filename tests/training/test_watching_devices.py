"""Two processes log the facts of a single one, sharded or not, and end together where a run diverges."""

import json

import pytest
from several import BATCH, Launched, write_task_recipe

from dlor_peft.training.watching import read_history

SHORT = ["training.max_steps=3", "training.save_strategy=no", "adapter.mode=multiplicative"]


def logged(out):
    history = json.loads((out / "metrics.json").read_text())["history"]
    return [{key: entry[key] for key in entry if key.startswith("dlor_")} for entry in history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("launch", ["ddp", "fsdp2"])
def test_two_processes_log_the_facts_of_one(tmp_path, launch):
    recipe = write_task_recipe(tmp_path, "sft")
    alone = Launched.dlor(tmp_path / "log-1", recipe, *SHORT, f"output_dir={tmp_path}/one")
    assert alone.end() == 0, alone.text
    half = f"training.per_device_train_batch_size={BATCH // 2}"
    words = [*SHORT, half, f"output_dir={tmp_path}/two", "--launch", launch, "--processes", "2"]
    both = Launched.dlor(tmp_path / "log-2", recipe, *words)
    assert both.end() == 0, both.text
    one, two = (logged(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 3
    for want, got in zip(one, two, strict=True):
        assert got.pop("dlor_condition_bound_layer") in both.text
        want.pop("dlor_condition_bound_layer")
        assert got == pytest.approx(want, rel=1e-3)
    lines = [read_history(tmp_path / name / "layers.jsonl") for name in ("one", "two")]
    assert [line["step"] for line in lines[1]] == [1, 2, 3]
    for name, layer in lines[0][-1]["layers"].items():
        assert lines[1][-1]["layers"][name] == pytest.approx(layer, rel=1e-3)


@pytest.mark.slow
@pytest.mark.distributed
def test_all_processes_end_where_the_run_diverges(tmp_path):
    recipe = write_task_recipe(tmp_path, "sft")
    words = ["training.learning_rate=1e25", "--launch", "fsdp2", "--processes", "2"]
    run = Launched.dlor(tmp_path / "log", recipe, *SHORT, *words)
    assert run.end() == 2, run.text
    assert run.text.count("training diverged at step") == 1, run.text
    assert "Lower training.learning_rate" in run.text
    assert not (tmp_path / "out" / "adapter").exists()
    assert not (tmp_path / "out" / "metrics.json").exists()
