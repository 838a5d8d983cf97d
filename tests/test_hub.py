"""A pushed adapter comes back from the Hub as it was, over HTTP and from the cache, with a card that explains it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import ModelCard
from tiny_models import VOCABULARY, build
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]

START = """
import sys, torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

results = {}

def base():
    return AutoModelForCausalLM.from_pretrained("org/base")

def record(name, model):
    with torch.no_grad():
        results[name] = model.eval()(input_ids=torch.arange(3, 13)[None]).logits

def attempt(name, function):
    try:
        function()
    except Exception as error:
        results[name] = type(error).__name__, str(error), type(error.__context__).__name__, str(error.__context__)
"""
END = """
torch.save(results, sys.argv[1])
"""

PUSH = """
import dlor_peft

def push(seed, form, revision=None, **kwargs):
    config = dlor_peft.DLoRConfig(
        r=2, target_modules=["q_proj", "up_proj"], init_weights=False, task_type="CAUSAL_LM", **form
    )
    torch.manual_seed(seed)
    model = get_peft_model(base(), config)
    model.add_adapter("other", config)
    model.push_to_hub("org/adapter", revision=revision, **kwargs)
    record(f"{revision}", model)
    model.set_adapter("other")
    record(f"{revision} other", model)

push(0, {"mode": "multiplicative", "depth": 2}, tags=["mine"])
push(1, {"mode": "scaled", "side": "both"}, revision="v2")
AutoTokenizer.from_pretrained("org/base").push_to_hub("org/adapter")
model = AutoPeftModelForCausalLM.from_pretrained("org/adapter")
for _ in range(2):
    model.push_to_hub("org/own")
model = base()
model.add_adapter(dlor_peft.DLoRConfig(r=2, target_modules=["q_proj"]))
model.push_to_hub("org/integrated")
"""

LOAD = """
import dlor_peft  # makes DLOR known to PEFT
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE

def load_other(revision):
    # offline, PEFT 0.21 looks for the weights of any method in other/other
    address = snapshot_download("org/adapter", revision=revision) if HF_HUB_OFFLINE else "org/adapter"
    return PeftModel.from_pretrained(base(), address, subfolder="other", revision=revision)

record("base", base())
record("None", PeftModel.from_pretrained(base(), "org/adapter"))
record("None other", load_other("main"))
record("v2", PeftModel.from_pretrained(base(), "org/adapter", revision="v2"))
record("v2 other", load_other("v2"))
record("Auto None", AutoPeftModelForCausalLM.from_pretrained("org/adapter"))
record("Auto v2", AutoPeftModelForCausalLM.from_pretrained("org/adapter", revision="v2"))
record("Transformers None", AutoModelForCausalLM.from_pretrained("org/adapter"))
"""

FAIL = """
attempt("revision", lambda: PeftModel.from_pretrained(base(), "org/adapter", revision="v3"))
attempt("repository", lambda: PeftModel.from_pretrained(base(), "org/nothing"))
attempt("subfolder", lambda: PeftModel.from_pretrained(base(), "org/adapter", subfolder="nothing"))
"""

WITHOUT_IMPORT = """
attempt("PeftModel", lambda: PeftModel.from_pretrained(base(), "org/adapter"))
attempt("AutoPeftModel", lambda: AutoPeftModelForCausalLM.from_pretrained("org/adapter"))
attempt("Transformers", lambda: AutoModelForCausalLM.from_pretrained("org/adapter"))
assert not any(name.startswith("dlor_peft") for name in sys.modules)
"""


def run(code, folder, environment):
    """What a program of a user's, in a process of its own, leaves in `results`."""
    output = folder / "results.pt"
    command = [sys.executable, "-W", "ignore", "-c", START + code + END, str(output)]
    environment = {**environment, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(output)


@pytest.fixture
def hub(tmp_path):
    """A Hub with the base model, and a repository that is empty but for its owner's card."""
    base = tmp_path / "base"
    build("llama").save_pretrained(base)
    words = {"<unk>": 0, **{f"word{index}": index for index in range(1, VOCABULARY)}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "<unk>")), unk_token="<unk>")
    tokenizer.save_pretrained(base)
    own = tmp_path / "own"
    own.mkdir()
    (own / "README.md").write_text("---\nlicense: mit\ntags:\n- own\n---\n\n# My words\n")
    with HubServer() as hub:
        hub.add_repo("org/base", base)
        hub.add_repo("org/own", own)
        yield hub


# one test, for each of its three processes takes seconds to import torch and transformers
@pytest.mark.slow
def test_an_adapter_comes_back_from_the_hub_as_it_was(hub, tmp_path):
    pushed = run(PUSH, tmp_path, hub.environment(tmp_path / "writer"))
    check_that_four_differ(pushed)
    check_files(hub)
    check_card(hub.files("org/adapter"))
    check_own_card(hub.files("org/own"))
    check_integrated_card(hub.files("org/integrated"))

    loaded = run(LOAD + FAIL, tmp_path, hub.environment(tmp_path / "reader"))
    check_loaded(loaded, pushed)
    check_hub_errors(loaded)

    num_requests = len(hub.requests)
    cached = run(WITHOUT_IMPORT + LOAD, tmp_path, hub.environment(tmp_path / "reader", offline=True))
    assert len(hub.requests) == num_requests
    check_unknown_method(cached)
    check_loaded(cached, pushed)


def check_that_four_differ(pushed):
    values = list(pushed.values())
    assert len(values) == 4
    for index, value in enumerate(values):
        assert not any(torch.allclose(value, other, atol=1e-2) for other in values[:index])


def check_files(hub):
    for revision in ("main", "v2"):
        files = hub.files("org/adapter", revision)
        for folder in ("", "other/"):
            assert {f"{folder}{name}" for name in ("README.md", "adapter_model.safetensors")} <= set(files)
            config = json.loads(files[f"{folder}adapter_config.json"])
            assert (config["peft_type"], config["base_model_name_or_path"]) == ("DLOR", "org/base")


def check_card(files):
    """It is PEFT's and DLoR's, not the one by which transformers replaces it at the end of a push."""
    for path in ("README.md", "other/README.md"):
        card = ModelCard(files[path].decode())
        assert card.data.library_name == "peft"
        assert {"dlor", "peft"} <= set(card.data.tags)
        assert card.text.count("import dlor_peft") == 1
        for row in ("| base model | `org/base` |", "| mode | `multiplicative` |", "| depth | 2 |"):
            assert row in card.text
    card = ModelCard(files["README.md"].decode())
    assert {"base_model:adapter:org/base", "transformers", "mine"} <= set(card.data.tags)
    assert (card.data.base_model, card.data.pipeline_tag) == ("org/base", "text-generation")
    assert "- PEFT " in card.text
    assert 'PeftModel.from_pretrained(base_model, "org/adapter")' in card.text


def check_own_card(files):
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "mit"
    assert {"own", "dlor", "base_model:adapter:org/base"} <= set(card.data.tags)
    assert card.text.count("# My words") == card.text.count("import dlor_peft") == 1


def check_integrated_card(files):
    """That of a transformers model, which holds its adapters without a PeftModel."""
    card = ModelCard(files["README.md"].decode())
    assert {"dlor", "peft"} <= set(card.data.tags)
    assert "| base model | `org/base` |" in card.text
    assert 'PeftModel.from_pretrained(base_model, "org/integrated")' in card.text


def check_loaded(loaded, pushed):
    for name in ("None", "None other", "v2", "v2 other", "Auto None", "Auto v2", "Transformers None"):
        torch.testing.assert_close(loaded[name], pushed[name.removeprefix("Auto ").removeprefix("Transformers ")])
        assert not torch.allclose(loaded[name], loaded["base"], atol=1e-2)


def check_hub_errors(results):
    """huggingface_hub's own error is in the traceback, over PEFT's."""
    for name, error in {
        "revision": "RevisionNotFoundError",
        "repository": "RepositoryNotFoundError",
        "subfolder": "RemoteEntryNotFoundError",
    }.items():
        kind, text, context, reason = results[name]
        assert (kind, context) == ("ValueError", error)
        assert "Can't find 'adapter_config.json' at 'org/" in text
        assert "404 Client Error" in reason


def check_unknown_method(results):
    """Nothing in PEFT or transformers looks for methods that are installed beside PEFT: the card's line is needed."""
    for name in ("PeftModel", "AutoPeftModel", "Transformers"):
        assert results[name][:2] == ("KeyError", "'DLOR'")
