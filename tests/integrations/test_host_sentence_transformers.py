"""SentenceTransformer.add_adapter with DLoRConfig: trained, saved, and loaded as a SentenceTransformer again."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, BertConfig, BertModel

from dlor_peft import DLoRConfig

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

TOKENIZER = Path(__file__).parents[2] / "recipes" / "models" / "stories260K"
TEXTS = ["a cat sat", "the dog ran", "my card is lost"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=512, **sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return str(folder)


def embed(model):
    return model.encode(TEXTS, convert_to_tensor=True, show_progress_bar=False)


def adapted(base, **changes):
    model = SentenceTransformer(base, device="cpu")
    model.add_adapter(DLoRConfig(r=2, target_modules=["query", "value", "dense"], **changes))
    return model.eval()


def test_trains_saves_and_loads(base, tmp_path):
    plain = embed(SentenceTransformer(base, device="cpu"))
    model = adapted(base)
    assert torch.equal(embed(model), plain)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("dlor_" in name for name in trained)
    SentenceTransformerTrainer(
        model,
        SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=3, learning_rate=1e-2,
            use_cpu=True, dataloader_pin_memory=False, save_strategy="no", report_to="none", disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"anchor": TEXTS * 2, "positive": ["the cat", "a dog", "his card"] * 2}),
        loss=MultipleNegativesRankingLoss(model),
    ).train()  # fmt: skip
    want = embed(model.eval())
    assert not torch.allclose(want, plain)

    model.save_pretrained(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["peft_type"] == "DLOR"
    assert not list(tmp_path.glob("saved/model*.safetensors"))
    assert torch.equal(embed(SentenceTransformer(str(tmp_path / "saved"), device="cpu")), want)


def test_disable_enable_and_delete(base):
    plain = embed(SentenceTransformer(base, device="cpu"))
    model = adapted(base, init_weights=False)
    want = embed(model)
    assert not torch.allclose(want, plain)
    model.disable_adapters()
    assert torch.equal(embed(model), plain)
    model.enable_adapters()
    assert torch.equal(embed(model), want)
    model.delete_adapter("default")
    assert torch.equal(embed(model), plain)
