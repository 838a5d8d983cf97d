"""The study's own parts: what is matched, what is run next, what is concluded."""

from types import SimpleNamespace

import pytest
from peft import get_peft_model
from study_parts.methods import METHODS, SINGLE, TOLERANCE, allocate, num_parameters
from study_parts.results import Results, Run
from study_parts.schedule import GRID, LIMITS, SEEDS, Cell, missing
from study_parts.statistics import holm, paired
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

MODEL = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def layers_of(model):
    found = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear) and name != "lm_head"}
    return {name: (layer.in_features, layer.out_features) for name, layer in found.items()}


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_the_parameters_of_lora(name, k):
    method, model = METHODS[name], LlamaForCausalLM(LlamaConfig(**MODEL))
    layers = layers_of(model)
    ranks = allocate(method, layers, k)
    if ranks is None:
        # blocks of OFT divide the width, so that there are few sizes
        assert name == "oft"
        return
    count = num_parameters(method, layers, ranks)
    adapted = get_peft_model(model, method.config(ranks, layers))
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == count
    budget = k * sum(I + O for I, O in layers.values())
    if method.ranks != (SINGLE,):
        assert abs(count - budget) <= TOLERANCE * budget


def scored(best):
    """A task whose dev metric is best at one exponent of the learning rate."""
    cell, task = Cell("task", "lora", 1), SimpleNamespace(headline="accuracy", is_higher_better=True)
    rows, order = {}, []
    while runs := missing(cell, task, rows, num_seeds=3):
        for run in runs:
            exponent = next(e for e in range(LIMITS[0], LIMITS[1] + 1) if cell.run(e, run.seed) == run)
            metrics = {"accuracy": -abs(exponent - best)}
            rows[run] = {"dev": metrics} if run.seed == 0 else {"test": metrics}
            order.append((exponent, run.seed))
    return order


@pytest.mark.parametrize("best", [GRID[1], GRID[-1], GRID[0] - 2, LIMITS[1]])
def test_the_grid_goes_on_at_its_edges_and_then_come_fresh_seeds(best):
    order = scored(best)
    tried = [exponent for exponent, seed in order if seed == 0]
    assert set(GRID) <= set(tried)
    assert {best - 1, best, min(best + 1, LIMITS[1])} <= set(tried)
    assert order[-3:] == [(best, seed) for seed in SEEDS[:3]]
    assert len(set(order)) == len(order)


def test_a_cell_of_which_every_rate_diverges_ends():
    cell, task = Cell("task", "lora", 1), SimpleNamespace(headline="accuracy", is_higher_better=True)
    rows = {}
    while runs := missing(cell, task, rows, num_seeds=3):
        rows |= {run: {"diverged": 3} for run in runs}
    assert {run.seed for run in rows} == {0}


def test_rows_outlive_a_process_that_is_killed_while_it_writes(tmp_path):
    run = Run("task", "lora", 1, 1e-3, 0)
    results = Results(tmp_path, "here")
    results.add(run, {"dev": {"accuracy": 0.5}})
    with results.path.open("a") as file:
        file.write('{"run": {"task"')
    again = Results(tmp_path, "here")
    assert again.rows == results.rows
    again.add(Run("task", "dora", 1, 1e-3, 0), {"dev": {"accuracy": 0.6}})
    assert len(Results(tmp_path, "here").rows) == 2


def test_differences_are_paired_and_corrected():
    one, other = [0.81, 0.83, 0.85, 0.84, 0.82], [0.80, 0.82, 0.84, 0.83, 0.81]
    found = paired(one, other, margin=0.02)
    assert found.mean == pytest.approx(0.01)
    assert found.low <= found.mean <= found.high
    assert found.p < 0.01
    assert found.equivalence_p < 0.05
    noisy = paired([0.8, 0.9, 0.7, 0.85, 0.75], [0.82, 0.86, 0.74, 0.8, 0.78], margin=0.01)
    assert noisy.p > 0.5
    assert noisy.equivalence_p > 0.05
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
