"""Builds tiny random models, and adapters, in the place of those that the suite downloads."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from dlor_peft import DLoRConfig

from . import diffusion, hub
from .repos import ADAPTERS, BERT, MODELS, OPT, VOCABULARY, Adapter

# not the 0.02 of most configs: at a hidden size of 16 the adapters' effect would drown in the tests' tolerances
_SCALE = 0.8
_GAIN = 2.5
_IMAGES = {"image_processor_type": "ConvNextImageProcessor", "crop_pct": 0.875, "size": {"shortest_edge": 64}}
# the layer that makes the queries, in any of the models
_QUERIES = r".*\.(q|q_proj|query|c_attn)"


def build(cache: Path) -> None:
    """Write them all, with tokenizers, into a Hugging Face cache."""
    shutil.rmtree(cache, ignore_errors=True)
    torch.manual_seed(0)
    for name, arguments, repos in MODELS:
        model = _model(name, arguments)
        for repo in repos:
            hub.add(cache, repo, partial(_save, model))
    for name, arguments, repos in MODELS:
        if BERT in repos:
            # other weights under another revision
            hub.add(cache, BERT, partial(_save, _model(name, arguments)), ("v2.0.0",))
    hub.add(cache, "hf-internal-testing/tiny-sd-pipe", diffusion.save_stable_diffusion)
    hub.add(cache, "hf-internal-testing/tiny-flux2", diffusion.save_flux)
    # what is read for its config alone stays LoRA's
    config = peft.LoraConfig(base_model_name_or_path=OPT, target_modules=["q_proj", "v_proj"])
    hub.add(cache, "peft-internal-testing/tiny-opt-lora-revision", config.save_pretrained, ("main", "test"))
    for repo, adapter in ADAPTERS.items():
        hub.add(cache, repo, partial(_save_adapter, repo, adapter), adapter.revisions)


def _model(name: str, arguments: dict[str, Any]) -> Any:
    model_cls = getattr(transformers, name)
    special = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = model_cls.config_class(**{**special, **arguments})
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for field in ("initializer_range", "init_std"):
            if hasattr(part, field):
                setattr(part, field, _SCALE / getattr(part, "hidden_size", 16) ** 0.5)
    model = model_cls(config).eval()
    # in so small a model the layers must outweigh tied embeddings, or it repeats its last token whatever they say; a
    # larger one has to bear the noise of quantisation
    layers = model.modules() if getattr(config, "hidden_size", 0) < 64 else ()
    with torch.no_grad():
        for module in layers:
            if isinstance(module, nn.Linear | Conv1D) and module is not model.get_output_embeddings():
                module.weight *= _GAIN
    return model


def _save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    if isinstance(model, transformers.ResNetForImageClassification):
        (folder / "preprocessor_config.json").write_text(json.dumps(_IMAGES))
    else:
        _tokenizer(VOCABULARY).save_pretrained(folder)


def _save_adapter(repo: str, adapter: Adapter, folder: Path) -> None:
    """Write an adapter that changes the output of its model, with the tokenizer."""
    model = getattr(transformers, f"AutoModel{adapter.auto_class}").from_pretrained(adapter.base)
    if adapter.vocabulary != VOCABULARY:
        model.resize_token_embeddings(adapter.vocabulary)
    if adapter.holds_base:
        model.save_pretrained(folder)
        model.name_or_path = repo
    config = DLoRConfig(init_weights=False, task_type=adapter.task, target_modules=_QUERIES)
    peft.get_peft_model(model, config).save_pretrained(folder)
    _tokenizer(adapter.vocabulary).save_pretrained(folder)


def _tokenizer(size: int) -> PreTrainedTokenizerFast:
    """One token a byte after the special ones, and as many unused ones as make up the size."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    unused = [f"<unused{number}>" for number in range(size - len(special) - len(alphabet))]
    tokens = {token: number for number, token in enumerate(special + alphabet + unused)}
    tokenizer = Tokenizer(models.BPE(tokens, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


if __name__ == "__main__":
    # heads without weights, bases that are looked for on the Hub: all of it is meant
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    build(Path(sys.argv[1]))
