from pathlib import Path

import datasets
import pytest
import yaml
from samples import TOKENIZER, TOPICS, write_rows
from stand_ins import build_model
from transformers import AutoTokenizer, BertConfig, BertModel, set_seed


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            # PEFT reads the attribute that transformers renamed
            item.add_marker(pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"))


@pytest.fixture(scope="session", autouse=True)
def _own_datasets_cache(tmp_path_factory):
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """A BERT of 30 thousand parameters with a real tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    set_seed(0)
    config = BertConfig(
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder


@pytest.fixture
def write_recipe(tmp_path, encoder):
    """Writes a small classification recipe with its data; keyword arguments replace top-level sections."""

    def write(**sections):
        rows = [{"text": f"{text} {index}", "label": label} for index in range(12) for label, text in TOPICS.items()]
        for name in ("train", "dev", "test"):
            write_rows(tmp_path / f"{name}.jsonl", rows)
        recipe = {
            "model": {"path": str(encoder), "pooling": "mean"},
            "task": {"type": "text-classification"},
            "optimizer": {"head_learning_rate": 1e-2},
            "data": {"files": {name: f"{name}.jsonl" for name in ("train", "dev", "test")}},
            "adapter": {"peft_type": "DLOR", "r": 2, "target_modules": "all-linear"},
            "training": {
                "max_steps": 2,
                "learning_rate": 1e-2,
                "use_cpu": True,
                "dataloader_pin_memory": False,
                "logging_steps": 1,
                "save_strategy": "no",
                "disable_tqdm": True,
            },
            "output_dir": str(tmp_path / "out"),
        }
        if "task" in sections or "adapter" in sections:
            # it may have no head
            del recipe["optimizer"]
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**recipe, **sections}))
        return path

    return write


@pytest.fixture(scope="session")
def stand_in_model(tmp_path_factory):
    """Hub id -> the folder of the small model that stands in for it."""
    folder, built = tmp_path_factory.mktemp("models"), {}

    def of(hub_id):
        if hub_id not in built:
            built[hub_id] = build_model(hub_id, folder / hub_id.replace("/", "--"))
        return built[hub_id]

    return of
