"""A dry run tells what a run would do, finds what would stop it, and leaves no trace."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from hub_server import HubServer
from peft import get_peft_model
from samples import TOKENIZER, write_rows
from stand_ins import stand_in_data

from dlor_peft.cli import main
from dlor_peft.training import checkpointing
from dlor_peft.training.configs import build_adapter_config, build_training_arguments
from dlor_peft.training.dry_run import batches, for_dry_run
from dlor_peft.training.memory import step_memory
from dlor_peft.training.packaged import packaged_recipes
from dlor_peft.training.recipe import load_recipe
from dlor_peft.training.tasks import task_class

SFT = {
    "max_steps": 2,
    "bf16": False,
    "activation_checkpointing": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}
CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def dry(capsys, *arguments, code=0):
    assert main(["train", *map(str, arguments), "--dry-run"]) == code
    told = capsys.readouterr()
    return told.err if code else told.out


@pytest.fixture
def sft(write_recipe, tmp_path):
    """Writes an SFT recipe over these rows."""

    def write(rows, columns=None, path=TOKENIZER, **sections):
        write_rows(tmp_path / "rows.jsonl", rows)
        data = {"files": {"train": "rows.jsonl", "test": "rows.jsonl"}, "columns": columns or {}}
        model = {"path": str(path), "dtype": "float32"}
        return write_recipe(model=model, task={"type": "sft"}, data=data, training=SFT, **sections)

    return write


@pytest.mark.parametrize("name", packaged_recipes())
def test_every_packaged_recipe(name, stand_in_model, tmp_path, capsys):
    recipe = yaml.safe_load(packaged_recipes()[name].read_text())
    overrides = ["data.max_rows=80", f"output_dir={tmp_path / 'out'}", "training.use_cpu=true"]
    if "dataset" in recipe["data"]:
        overrides += [f"model.path={stand_in_model(recipe['model']['path'])}", *stand_in_data(recipe, tmp_path)]
    told = dry(capsys, name, *overrides)
    assert re.search(r"\d+ of [\d,]+ parameters are trainable", told)
    assert "in all, with" in told
    assert "nothing was found that would stop the run" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
def test_a_recipe_for_an_accelerator_is_checked_without_one(write_recipe, capsys):
    path = write_recipe(training={"max_steps": 2, "bf16": True})
    told = dry(capsys, path)
    assert "device: this machine has no accelerator; without one, the run itself wants training.use_cpu=true" in told
    assert "nothing was found that would stop the run" in told
    assert main(["train", str(path), "--explain"]) == 0
    assert "bf16: true" in capsys.readouterr().out
    assert main(["train", str(path)]) == 2
    assert "use_cpu" in capsys.readouterr().err


def test_a_configuration_of_several_processes_is_looked_at(write_recipe, tmp_path, capsys):
    path = write_recipe()
    assert "--launch: 'fsdp3' is no file. Did you mean 'fsdp2'?" in dry(capsys, path, "--launch", "fsdp3", code=2)
    file = tmp_path / "own.yaml"
    file.write_text("{distributed_type: FSDP, num_processes: 6}")
    assert "in all on each of 6 devices, FSDP2 or ZeRO-3" in dry(capsys, path, "--launch", file)


def test_no_weights_are_needed_and_what_is_told_is_what_is_trained(write_recipe, encoder, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(encoder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    path = write_recipe(model={"path": str(bare), "pooling": "mean"})
    before = sorted(tmp_path.rglob("*"))
    told = dry(capsys, path)
    assert sorted(tmp_path.rglob("*")) == before
    assert main(["train", str(write_recipe())]) == 0
    trained = capsys.readouterr().out
    table = trained[trained.index("trainable") : trained.index("are trainable")]
    assert table in told
    assert "encoder.encoder.layer.*.attention.self.query" in table


def test_the_first_row_of_a_classifier(write_recipe, capsys):
    told = dry(capsys, write_recipe())
    assert "my card is lost 0" in told
    assert "label: card" in told


def test_the_prompt_is_not_trained_and_the_completion_is(sft, capsys):
    rows = [{"prompt": "First Citizen:", "completion": " We are accounted poor citizens."}] * 4
    told = dry(capsys, sft(rows, {"prompt": "prompt", "completion": "completion"}))
    (shown,) = re.findall(r"^.*First Citizen:.*$", told, re.MULTILINE)
    assert re.fullmatch(r"<s> ?First Citizen: ?>> ?We are accounted poor citizens\.</s><<", shown)


def test_a_chat_is_shown_as_the_template_renders_it(sft, tmp_path, capsys):
    from transformers import AutoTokenizer

    folder = tmp_path / "chat"
    shutil.copytree(TOKENIZER, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    rows = [{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]}] * 4
    told = dry(capsys, sft(rows, {"messages": "messages"}, folder))
    assert re.search(r">>.*\[user\]Who\?\[assistant\]I\.", told)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter.target_modules=[query, kee, value]"], r"adapter\.target_modules: 'kee' matches nothing.*'key'"),
        (
            ["adapter.exclude_modules=[valu]"],
            r"adapter\.exclude_modules: 'valu' matches nothing.*Did you mean 'value'",
        ),
        (["adapter.exclude_modules=.*valu"], r"adapter\.exclude_modules: '\.\*valu' matches nothing"),
        (["adapter.rank_pattern={querry: 4}"], r"adapter\.rank_pattern: 'querry' matches nothing.*'query'"),
        (["adapter.mode_pattern={pooler: additive}"], r"adapter\.mode_pattern: 'pooler' matches nothing"),
        (["adapter.side_pattern={quer: input}"], r"adapter\.side_pattern: 'quer' matches nothing"),
        (
            ["adapter.mode=multiplicative", "adapter.depth_pattern={quer: 2}"],
            r"adapter\.depth_pattern: 'quer' matches",
        ),
        (
            ["adapter.modules_to_save=[clasifier]"],
            r"adapter\.modules_to_save: 'clasifier' matches nothing.*classifier",
        ),
        (
            ["adapter.target_modules=[query]", "adapter.layers_to_transform=[0, 7]"],
            r"adapter\.layers_to_transform: 7 matches nothing\. There: 0",
        ),
        (["optimizer={name: Muon}"], r"optimizer: Muon only supports 2D"),
        (["adapter.target_modules=[nope]"], r"adapter: .*adapter.target_modules is .*nope"),
        (["adapter.target_modules=nope"], r"adapter: .*adapter.target_modules is .*nope"),
        (["data.columns.label=lable"], r"data\.columns\.label: the \w+ split has no column 'lable'"),
        (["training.packing=true"], r"training\.packing: no field of TrainingArguments"),
    ],
)
def test_what_would_stop_a_run_or_matches_nothing_is_an_error(write_recipe, capsys, overrides, message):
    assert re.search(message, dry(capsys, write_recipe(), *overrides, code=2))


def test_all_problems_are_told_together(write_recipe, tmp_path, capsys):
    (tmp_path / "out").touch()
    overrides = ["adapter.rank_pattern={querry: 4, kee: 2}", "adapter.exclude_modules=[valu]"]
    error = dry(capsys, write_recipe(), *overrides, code=2)
    assert "--dry-run found 4: (1) output_dir: " in error
    for part in ("is a file", "'querry'", "'kee'", "'valu'"):
        assert part in error


def test_all_matched_is_no_error(write_recipe, capsys):
    adapter = {
        "peft_type": "DLOR",
        "r": 2,
        "mode": "multiplicative",
        "target_modules": ["query", "encoder.layer.1.output.dense"],
        "exclude_modules": ["layer.0.attention.self.key"],
        "modules_to_save": ["classifier"],
        "layers_to_transform": [0, 1],
        "rank_pattern": {r"layer\.0\.attention\.self\.query": 4},
        "depth_pattern": {"query": 2},
        "mode_pattern": {"output.dense": "additive"},
    }
    told = dry(capsys, write_recipe(adapter=adapter))
    assert "encoder.encoder.layer.*.attention.self.query        2" in told
    assert "encoder.encoder.layer.*.output.dense                1" in told


@pytest.mark.parametrize("peft_type", ["LORA", "IA3"])
def test_other_methods(write_recipe, capsys, peft_type):
    targets = ["query", "output.dense"]
    adapter = {"peft_type": peft_type, "target_modules": targets}
    if peft_type == "IA3":
        adapter["feedforward_modules"] = ["output.dense"]
    assert "memory of a step (estimated)" in dry(capsys, write_recipe(adapter=adapter))
    error = dry(capsys, write_recipe(adapter={**adapter, "target_modules": [*targets, "kee"]}), code=2)
    assert "'kee' matches nothing" in error


def test_the_state_of_the_output_folder(write_recipe, tmp_path, capsys):
    path = write_recipe()
    assert "out: new" in dry(capsys, path)
    assert main(["train", str(path), "training.save_strategy=steps", "training.save_steps=1"]) == 0
    capsys.readouterr()
    error = dry(capsys, path, code=2)
    assert "finished run of another recipe" in error
    assert "an earlier run, which would be replaced" in dry(capsys, path, "--overwrite")
    same = [path, "training.save_strategy=steps", "training.save_steps=1"]
    assert "a finished run of this recipe" in dry(capsys, *same)
    (tmp_path / "out" / "metrics.json").unlink()
    assert "checkpoints of an unfinished run" in dry(capsys, *same, code=2)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_told(write_recipe, tmp_path, capsys):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert "is not writable" in dry(capsys, write_recipe(), f"output_dir={locked / 'out'}", code=2)


ASKED = ["training.push_to_hub=true", "training.hub_model_id=me/adapter"]


@pytest.mark.parametrize(
    ("me", "asked", "message"),
    [
        ({}, ASKED, "training.push_to_hub: to me/adapter, as me"),
        ({"role": "read"}, ASKED, "the token may read only"),
        ({"role": "fineGrained"}, ASKED, "with a fine-grained token"),
        ({}, ["training.push_to_hub=true", "training.hub_model_id=they/adapter"], "me is no member of 'they'"),
        (
            {"orgs": {"they": "write"}},
            ["training.push_to_hub=true", "training.hub_model_id=they/x"],
            "to they/x, as me",
        ),
        (
            {"orgs": {"they": "read"}},
            ["training.push_to_hub=true", "training.hub_model_id=they/x"],
            "role in they may r",
        ),
        (None, ASKED, "the Hub does not know you"),
    ],
)
def test_hub_permission(write_recipe, tmp_path, me, asked, message):
    with HubServer() as hub:
        environment = hub.environment(tmp_path / "home")
        if me is None:
            del environment["HF_TOKEN"]
        hub.me |= me or {}
        command = [sys.executable, "-m", "dlor_peft.cli", "train", str(write_recipe()), *asked, "--dry-run"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert message in done.stdout + done.stderr
        assert done.returncode == (2 if "may" in message or "no" in message.split() or "not" in message else 0) or (
            "fine-grained" in message and done.returncode == 0
        )
        # nothing is made there
        assert not hub.repos


def test_the_finished_adapter_is_pushed(write_recipe, tmp_path):
    with HubServer() as hub:
        command = [sys.executable, "-m", "dlor_peft.cli", "train", str(write_recipe()), *ASKED]
        words = ["training.save_strategy=steps", "training.save_steps=1"]
        done = subprocess.run(
            [*command, *words], env=hub.environment(tmp_path / "home"), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert f"pushed to {hub.url}/me/adapter" in done.stdout
        pushed, folder = hub.files("me/adapter"), tmp_path / "out" / "adapter"
        assert {path.name for path in folder.iterdir()} <= set(pushed)
        assert pushed["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()
        assert not any("checkpoint" in name or name.startswith("optimizer") for name in pushed)


def test_a_model_of_the_hub_costs_its_config_and_tokenizer(write_recipe, encoder, tmp_path):
    with HubServer() as hub:
        hub.add_repo("me/encoder", encoder)
        path = write_recipe(model={"path": "me/encoder", "pooling": "mean"})
        command = [sys.executable, "-m", "dlor_peft.cli", "train", str(path), "--dry-run"]
        done = subprocess.run(command, env=hub.environment(tmp_path / "home"), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        fetched = {request.rpartition("/")[2] for request in hub.requests if request.startswith("GET /me/encoder")}
        assert "config.json" in fetched
        assert not any(name.endswith((".safetensors", ".bin")) for name in fetched)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_the_estimated_memory_is_what_a_step_allocates(write_recipe, tmp_path, checkpointed):
    """Counted by torch's profiler in a real step."""
    recipe, _ = load_recipe(str(write_recipe()), ["adapter.mode=multiplicative"])
    task = task_class(recipe.task.type)(recipe)

    def trainer_on(base, arguments):
        return task.build_trainer(get_peft_model(base, build_adapter_config(recipe)), arguments)

    with torch.device("meta"):
        empty = trainer_on(task.build_empty(), for_dry_run(build_training_arguments(recipe), tmp_path / "scratch"))
    loader, rows = batches(empty)
    batch = loader.collate_fn([loader.dataset[row] for row in rows])
    estimated = step_memory(empty, batch)

    trainer = trainer_on(task.load_model(), build_training_arguments(recipe))
    model, optimizer = trainer.model, trainer.create_optimizer()
    model.train()
    if checkpointed:
        checkpointing.switch_on(model, trainer.args)

    def step():
        trainer.compute_loss(model, dict(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    activations = estimated.activations_checkpointed if checkpointed else estimated.activations
    assert activations + estimated.gradients == pytest.approx(peak, rel=0.15)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert estimated.trained == estimated.gradients == sum(p.nbytes for p in trained)
    states = [s for of_one in optimizer.state.values() for s in of_one.values()]
    assert estimated.optimizer == sum(s.nbytes for s in states)
    frozen = [t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad]
    assert estimated.weights == sum(t.nbytes for t in frozen)
    assert estimated.sharded(4, checkpointed) < estimated.total(checkpointed)
    units = [part for part in model.modules() if type(part).__name__ in ("BertLayer", "BertEmbeddings")]
    largest = sorted(sum(t.nbytes for t in (*unit.parameters(), *unit.buffers())) for unit in units)[-2:]
    assert estimated.gathered == sum(largest)


@pytest.mark.parametrize(
    "optimizer", ["optimizer={max_ratio: 0.5, u_lr_ratio: 2.0}", "optimizer={name: NAdam}", "training.optim=adafactor"]
)
def test_the_states_of_any_optimizer_are_counted(write_recipe, capsys, optimizer):
    told = dry(capsys, write_recipe(), "adapter.mode=multiplicative", optimizer)
    assert re.search(r"^optimizer +\d", told, re.MULTILINE)


def test_a_finished_run_is_not_touched(write_recipe, tmp_path, capsys):
    path = write_recipe()
    assert main(["train", str(path)]) == 0
    before = (tmp_path / "out" / "metrics.json").read_text()
    names = sorted(tmp_path.rglob("*"))
    dry(capsys, path, "--overwrite")
    assert (tmp_path / "out" / "metrics.json").read_text() == before
    assert json.loads(before)["steps"] == 2
    assert sorted(tmp_path.rglob("*")) == names
