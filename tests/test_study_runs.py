"""The study in small: a base is pre-trained, methods run on it and are timed, and the rows answer the questions."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from study_parts import report, tasks, training
from study_parts.pretraining import BASE, pretrain
from study_parts.questions import answers
from study_parts.reading import read
from study_parts.results import Results, Run
from study_parts.sources import Sources
from study_parts.times import measure_times
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

SCRIPTS = Path(__file__).parents[1] / "scripts"
LETTERS = "abcdefgh "
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
TASK = "shakespeare llama"


def text(generator, letters, length):
    """Each letter is followed by the next one, mostly."""
    place, found = 0, []
    for _ in range(length):
        place = (place + 1) % len(letters) if generator.random() < 0.9 else generator.randrange(len(letters))
        found.append(letters[place])
    return "".join(found)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    shared = tmp_path_factory.mktemp("shared")
    tokenizer = Tokenizer(WordLevel({"<unk>": 0, **{letter: 1 + i for i, letter in enumerate(LETTERS)}}, "<unk>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<unk>")
    fast.save_pretrained(shared / "models" / "stories260K")
    generator = random.Random(0)
    for data, letters in ((BASE, LETTERS), ("tinyshakespeare", LETTERS[::-1])):
        (shared / "data" / data).mkdir(parents=True)
        for split, length in (("train", 40_000), ("dev", 2_000), ("test", 2_000)):
            (shared / "data" / data / f"{split}.txt").write_text(text(generator, letters, length))
    return Sources(shared, pretrained=tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def base(sources):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    bits = pretrain(sources, sources.pretrained / "llama", minutes=0.1, sizes=SIZES)
    tasks.tasks(sources)[TASK].steps = 24
    yield bits
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def results(sources, base, tmp_path_factory):
    results = Results(tmp_path_factory.mktemp("results"), "here")
    cells = [("lora", 1), ("lora", 2), ("dlor scaled U x4", 1), ("dlor scaled U x4", 2), ("dora", 2), ("full", 0)]
    for method, k in cells:
        for rate in (0.003, 0.01):
            run = Run(TASK, method, k, rate, training.SELECTION_SEEDS[0])
            results.add(run, training.run_one(run, sources))
        for seed in (1, 2, 3):
            run = Run(TASK, method, k, 0.01, seed)
            results.add(run, training.run_one(run, sources))
    return results


def test_a_base_is_pre_trained_and_loads(sources, base):
    # between what 9 letters of equal chance take and what the source of the text does
    assert 0.5 < base < 3.0
    model = AutoModelForCausalLM.from_pretrained(sources.pretrained / "llama")
    assert model.config.hidden_size == SIZES["hidden_size"]
    found = tasks.tasks(sources)[TASK]
    assert found.evaluate(model, "base")["bits_per_byte"] == pytest.approx(base, abs=0.2)


def test_runs_learn_from_the_same_start_and_forget(results, base):
    for run, row in results.rows.items():
        if run.seed in training.SELECTION_SEEDS:
            assert set(row["dev"]) == {"bits_per_byte"}
            continue
        steps, losses, kept = zip(*row["path"], strict=True)
        assert steps == (1, 4, 7, 10, 13, 16, 19, 22)
        assert row["test"]["bits_per_byte"] < losses[0]
        assert row["base_loss"] > kept[0]
        assert kept[0] == pytest.approx(base, abs=0.3)
    (aligned,) = {
        tuple(row["alignment"]) for run, row in results.rows.items() if run.method == "full" and "alignment" in row
    }
    assert aligned == ("rows", "columns")


def test_the_same_run_gives_the_same_row(sources, results):
    run = Run(TASK, "dlor scaled U x4", 1, 0.01, 1)
    again = training.run_one(run, sources)
    assert again["path"] == results.rows[run]["path"]


def test_rows_answer_the_questions(results):
    readings = read(results.rows)
    times = [{"task": TASK, "k": 2, "methods": {"dlor scaled U x4": {"median": 0.9}, "dora": {"median": 1.8}}}]
    lora, dora, small, forgetting, robust, aligned = answers(readings.values(), times)
    assert lora.count(f"| {TASK} | ") == 2
    assert f"| {TASK} | 1 | dlor scaled U x4 |" in small
    assert f"| {TASK} | 2 | dora |" in forgetting
    assert f"| {TASK} | lora | k | 1: " in robust
    assert "in margins" in aligned
    assert TASK in aligned
    assert dora.endswith("| 0.50 |")


def test_forgetting_is_compared_at_the_loss_that_both_reach():
    rows = {
        Run("t", "lora", 1, 0.1, seed): {
            "test": {"bits_per_byte": 2.0},
            "base_loss": 3.0,
            "path": [[1, 4.0, 1.0], [2, 3.0, 2.0]],
        }
        for seed in (1, 2, 3)
    }
    rows |= {
        Run("t", "dora", 1, 0.1, seed): {
            "test": {"bits_per_byte": 2.5},
            "base_loss": 1.5,
            "path": [[1, 4.0, 1.0], [2, 3.0, 1.25]],
        }
        for seed in (1, 2, 3)
    }
    (forgetting,) = [table for table in answers(read(rows).values(), []) if "Forgetting" in table]
    # LoRA has 2.5 half way from 3 to 2, where its base loss is 2.5; DoRA ends there with 1.5
    assert "| dora | 1.500 | 2.500 | -1.0000 [-1.0000, -1.0000] |" in forgetting


def test_the_report_has_a_row_for_each_cell(results, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "here.jsonl").write_bytes(results.path.read_bytes())
    (tmp_path / "here-times.json").write_text(json.dumps([]))
    written = report.write_report(tmp_path)
    assert (tmp_path / "report.md").read_text() == written
    assert (tmp_path / "here.png").stat().st_size > 10_000
    for cell in ("| 1 | lora |", "| 2 | dlor scaled U x4 |", "| - | full |"):
        assert cell in written


def test_steps_are_timed_over_lora(sources, base):
    found = measure_times(sources, TASK, ["dlor scaled", "full"], k=1, rounds=1)
    of_dlor = found["methods"]["dlor scaled"]
    assert of_dlor["median"] > 0
    assert 0.5 < of_dlor["kept"] < 2
    assert found["methods"]["full"]["adapter_bytes"] > of_dlor["adapter_bytes"]


def test_a_run_that_fails_is_told_and_the_others_go_on(sources, base, tmp_path):
    bases = tmp_path / "bases"
    for name in ("broken", "llama"):
        shutil.copytree(sources.pretrained / "llama", bases / name)
    (bases / "broken" / "tokenizer.json").write_text("{}")

    def study(*tasks):
        folders = ["--shared", sources.shared, "--pretrained", bases, "--results", tmp_path / "results"]
        options = ["--methods", "lora", "--budgets", "1", "--seeds", "0", "--workers", "2"]
        command = [sys.executable, SCRIPTS / "study.py", *folders, *options, "--tasks", *tasks]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    first = study("shakespeare broken", "shakespeare llama")
    assert first.returncode == 1, first.stderr
    assert first.stdout.count("shakespeare broken | lora | k 1 | lr 0.001 | seed 0 | failed") == 1
    (file,) = (tmp_path / "results").glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["run"]["task"] for row in rows} == {"shakespeare llama"}
    assert {0.001, 0.00316, 0.01} <= {row["run"]["lr"] for row in rows}
    again = study("shakespeare llama")
    assert again.returncode == 0, again.stderr
    assert len(file.read_text().splitlines()) == len(rows)
