"""The study's own parts: what is matched, what is run next, what is concluded."""

import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import study
from peft import get_peft_model
from study_parts.methods import METHODS, SINGLE, allocate, num_parameters, rank_counts
from study_parts.questions import compare
from study_parts.reading import Choice, Reading
from study_parts.report import write_report
from study_parts.results import Results, Run
from study_parts.schedule import GRID, LIMITS, SEEDS, Cell, missing, of_another_setting, rate
from study_parts.statistics import corrected, holm, paired
from study_parts.training import SELECTION_SEEDS
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


IMPOSSIBLE = {"oft", "dlor scaled both", "dlor multiplicative depth 2", "dlor multiplicative depth 4"}
"""At k = 1: blocks of OFT divide the width, and the others would be diagonals alone."""


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_the_parameters_of_lora(name, k):
    method, model = METHODS[name], LlamaForCausalLM(LlamaConfig(**MODEL))
    layers = layers_of(model)
    ranks = allocate(method, layers, k)
    if ranks is None:
        assert (name, k) in {*((one, 1) for one in IMPOSSIBLE), ("oft", 4)}
        return
    count = num_parameters(method, layers, ranks)
    adapted = get_peft_model(model, method.config(ranks, layers))
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == count
    budget = k * sum(I + O for I, O in layers.values())
    if method.ranks != (SINGLE,):
        assert abs(count - budget) <= (0.04 if name == "oft" else 0.03) * budget


@pytest.mark.parametrize("name", ["dlor scaled", "dlor scaled input", "dlor multiplicative", "dora"])
def test_every_kind_of_layer_has_a_rank_in_some_block(name):
    layers = layers_of(LlamaForCausalLM(LlamaConfig(**MODEL)))
    ranks = allocate(METHODS[name], layers, 1)
    for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        of_kind = [ranks.get(layer, 0) for layer in layers if layer.endswith(kind)]
        assert sum(r > 0 for r in of_kind) > 0, (kind, of_kind)


CELL = Cell("task", "lora", 1)


def scored(first, again=None, num_seeds=3):
    """All runs of a cell in their order, exponent and seed, where a rule gives the dev metric of an exponent."""
    exponents = {rate(e): e for e in range(LIMITS[0], LIMITS[1] + 1)}
    rows, order = {}, []
    while runs := missing(CELL, Reading("task", rows), num_seeds):
        for run in runs:
            exponent = exponents[run.lr]
            value = (first if run.seed in (*SEEDS, SELECTION_SEEDS[0]) else again or first)(exponent)
            split = "dev" if run.seed in SELECTION_SEEDS else "test"
            rows[run] = {"diverged": 3} if value is None else {split: {"accuracy": value}}
            order.append((exponent, run.seed))
    assert len(set(order)) == len(order)
    return order, Reading("task", rows)


@pytest.mark.parametrize("best", [GRID[1], GRID[-1], GRID[0] - 2, LIMITS[1]])
def test_the_grid_goes_on_at_its_edges_and_then_come_fresh_seeds(best):
    order, reading = scored(lambda exponent: -abs(exponent - best))
    tried = [exponent for exponent, seed in order if seed == SELECTION_SEEDS[0]]
    assert set(GRID) <= set(tried)
    assert {best - 1, best, min(best + 1, LIMITS[1])} <= set(tried)
    assert order[-3:] == [(best, seed) for seed in SEEDS[:3]]
    assert reading.best(("lora", 1)) == Choice(rate(best), 0.0, 3)
    assert list(reading.test["lora", 1]) == [1, 2, 3]


def test_further_seeds_decide_between_the_two_best_rates():
    order, reading = scored({-7: 0.1, -6: 0.5, -5: 0.8, -4: 0.79, -3: 0.3}.get, {-5: 0.6, -4: 0.7}.get)
    assert [exponent for exponent, seed in order if seed in SELECTION_SEEDS[1:]] == [-5, -5, -4, -4]
    assert {exponent for exponent, seed in order if seed in SEEDS} == {-4}
    assert reading.best(("lora", 1)).value == pytest.approx((0.79 + 0.7 + 0.7) / 3)


def test_a_rate_that_diverges_with_a_further_seed_is_not_chosen():
    order, reading = scored({-6: 0.5, -5: 0.8, -4: 0.6, -3: 0.1}.get, {-4: 0.6}.get)
    assert {exponent for exponent, seed in order if seed in SEEDS} == {-4}
    assert reading.best(("lora", 1)).lr == rate(-4)


def test_rows_at_a_rate_that_is_not_chosen_are_not_reported():
    _, reading = scored({-6: 0.5, -5: 0.8, -4: 0.79}.get)
    stray = {CELL.run(rate(-4), seed): {"test": {"accuracy": 0.0}} for seed in SEEDS}
    assert Reading("task", {**reading.rows, **stray}).test == reading.test


def test_the_grid_goes_on_where_further_seeds_choose_its_edge():
    first = {-7: 0.1, -6: 0.5, -5: 0.8, -4: 0.79, -3: 0.3}.get
    order, reading = scored(first, {-5: 0.6, -4: 0.7}.get)
    assert (-3, SELECTION_SEEDS[0]) in order
    assert reading.best(("lora", 1)).lr == rate(-4)


def test_a_fresh_seed_that_diverges_is_told_and_not_left_out_of_the_mean():
    rows = {CELL.run(rate(-5), seed): {"test": {"accuracy": 0.8}} for seed in SEEDS}
    other = Cell("task", "dora", 1)
    rows |= {other.run(rate(-5), seed): {"test": {"accuracy": 0.9}} for seed in SEEDS}
    assert compare(Reading("task", rows), ("dora", 1), ("lora", 1)).mean == pytest.approx(0.1)
    rows[other.run(rate(-5), SEEDS[0])] = {"diverged": 3}
    reading = Reading("task", rows)
    assert compare(reading, ("dora", 1), ("lora", 1)) is None
    assert reading.num_diverged(("dora", 1)) == 1


def test_rows_of_other_steps_or_ranks_are_told():
    layers = {"task": layers_of(LlamaForCausalLM(LlamaConfig(**MODEL)))}
    task = SimpleNamespace(setting={"steps": 3})
    ranks = rank_counts(allocate(METHODS["lora"], layers["task"], 1))
    run = CELL.run(1e-3, 0)
    assert of_another_setting(CELL, task, layers, {run: {"setting": {"steps": 3}, "ranks": ranks}}) == []
    assert of_another_setting(CELL, task, layers, {run: {"setting": {"steps": 4}, "ranks": ranks}}) == [run]
    assert of_another_setting(CELL, task, layers, {run: {"setting": {"steps": 3}, "ranks": {"2": 9}}}) == [run]


def test_without_seeds_to_report_the_grid_is_all():
    order, reading = scored({-6: 0.5, -5: 0.8, -4: 0.79}.get, num_seeds=0)
    assert order == [(exponent, SELECTION_SEEDS[0]) for exponent in GRID]
    assert reading.best(("lora", 1)) == Choice(rate(-5), 0.8, 1)
    assert reading.test == {}


def test_a_cell_of_which_every_rate_diverges_ends():
    order, reading = scored(lambda exponent: None)
    assert {seed for _, seed in order} == {SELECTION_SEEDS[0]}
    assert min(order)[0] == LIMITS[0]
    assert reading.best(("lora", 1)) is None


def test_rows_outlive_a_process_that_is_killed_while_it_writes(tmp_path):
    run = Run("task", "lora", 1, 1e-3, 0)
    results = Results(tmp_path, "here")
    results.add(run, {"dev": {"accuracy": 0.5}})
    with results.path.open("a") as file:
        file.write('{"run": {"task"')
    written = results.path.read_bytes()
    again = Results(tmp_path, "here")
    assert again.rows == results.rows
    # another process may be about to end the line
    assert results.path.read_bytes() == written
    again.add(Run("task", "dora", 1, 1e-3, 0), {"dev": {"accuracy": 0.6}})
    assert len(Results(tmp_path, "here").rows) == 2


def test_the_report_is_that_of_the_rows_beside_it(tmp_path):
    pytest.importorskip("matplotlib", reason="the report has a figure")
    shutil.copytree(study.RESULTS, tmp_path / "results")
    assert write_report(tmp_path / "results") == (study.RESULTS / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("line", ["", "no json", "[1]", '{"dev": {}}', '{"run": {"task": "task"}}'])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    Results(tmp_path, "here").add(Run("task", "lora", 1, 1e-3, 0), {"dev": {"accuracy": 0.5}})
    with (tmp_path / "here.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match=r"here\.jsonl, line 2, is no row of a run"):
        Results(tmp_path, "here")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "nan"], "--minutes: nan is not above 0"),
        (["--pretrain", "-1"], "--pretrain: -1 is not above 0"),
        (["--workers", "0"], "--workers: 0 is not at least 1"),
        (["--budgets", "1", "0"], "--budgets: 0 is not at least 1"),
        (["--seeds", "6"], "--seeds: invalid choice: 6"),
        (["--shared", "nowhere"], "--shared: nowhere has no data and no models"),
        (["--encoder", "nowhere"], "--encoder: nowhere has no config.json"),
        (["--results", "file"], "--results: file is a file; give a folder"),
        (["--report", "--results", "nowhere"], "--results: nowhere has no rows"),
        (["--shared", ".", "--pretrained", "nowhere"], "--pretrained: nowhere is no folder"),
        (["--shared", ".", "--pretrain", "1"], "--pretrain: give --pretrained"),
        ([], "--shared: the folder of data and models is needed"),
    ],
)
def test_wrong_arguments_are_told(monkeypatch, capsys, tmp_path, arguments, message):
    for folder in ("data", "models"):
        (tmp_path / folder).mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["study.py", *arguments])
    with pytest.raises(SystemExit):
        study.main()
    assert message in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


def test_differences_are_paired_and_corrected():
    one, other = [0.81, 0.83, 0.85, 0.84, 0.82], [0.80, 0.82, 0.84, 0.83, 0.81]
    found = paired(one, other, margin=0.02)
    assert found.mean == pytest.approx(0.01)
    assert found.low <= found.mean <= found.high
    assert found.p < 0.01
    assert found.equivalence_p < 0.05
    assert min(np.subtract(one, other)) <= found.low
    assert found.high <= max(np.subtract(one, other))
    noisy = paired([0.8, 0.9, 0.7, 0.85, 0.75], [0.82, 0.86, 0.74, 0.8, 0.78], margin=0.01)
    assert noisy.p > 0.5
    assert noisy.equivalence_p > 0.05
    both = corrected({"a": found, "b": noisy})
    assert both["a"].p == 2 * found.p
    assert both["b"].p == noisy.p
    assert both["a"].equivalence_p == 2 * found.equivalence_p
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


def test_the_interval_holds_the_mean_of_five_normal_values_in_93_percent():
    draws = np.random.default_rng(0).normal(size=(300, 5))
    held = [(found := paired(values, np.zeros(5), 1)).low <= 0 <= found.high for values in draws]
    assert 0.90 <= np.mean(held) <= 0.96
