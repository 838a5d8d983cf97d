"""Where a recipe's base model and tokenizer come from."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .identity import build_identity, embeddings
from .quantization import build_quantization
from .schema import ModelSection
from .sources import suggest

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "package:"

_without_weights: ContextVar[bool] = ContextVar("without_weights", default=False)


@contextmanager
def without_weights() -> Iterator[None]:
    """Models that are loaded within are built from their config on the meta device: no weights are read."""
    import torch

    token = _without_weights.set(True)
    try:
        with torch.device("meta"):
            yield
    finally:
        _without_weights.reset(token)


def resolve_path(model: ModelSection) -> str:
    """A hub id as it is; an existing folder for a path or for `package:NAME`."""
    if model.path.startswith(PACKAGE):
        return _package_folder(model.path.removeprefix(PACKAGE))
    if model.path.startswith("/") and not Path(model.path).is_dir():
        raise FileNotFoundError(f"model.path: no folder {model.path}. Give a hub id, or the folder of a saved model.")
    return model.path


def _package_folder(package: str) -> str:
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ImportError(
            f"model.path: the Python package {package!r}, which carries this model, is not installed. "
            "The packaged recipes' models come with dlor-peft's extra 'quickstart'."
        )
    return str(Path(spec.origin).parent / "model")


def load_config(model: ModelSection) -> PretrainedConfig:
    """The model's config with the values of `model.config` set."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(resolve_path(model), revision=model.revision)
    for name, value in model.config.items():
        if not hasattr(config, name):
            raise ValueError(
                f"model.config.{name}: {type(config).__name__} has no such value.{suggest(name, config.to_dict())}"
            )
        setattr(config, name, value)
    return config


def load_tokenizer(model: ModelSection) -> PreTrainedTokenizerBase:
    """The model's tokenizer; one without a padding token pads with its end-of-sequence token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_path(model), revision=model.revision)
    if tokenizer.pad_token is None:
        print(f"the tokenizer has no padding token: padding with {tokenizer.eos_token!r}")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_classifier(
    model: ModelSection, labels: list[str], tokenizer: PreTrainedTokenizerBase, modules_to_save: Collection[str] = ()
) -> PreTrainedModel:
    """The frozen encoder under a newly drawn head whose labels have these names.

    `modules_to_save` are those that the adapter trains and saves besides the head: only they may be missing in the
    checkpoint.
    """
    from transformers import AutoModel, AutoModelForSequenceClassification

    config = load_config(model)
    id2label = dict(enumerate(labels))
    if model.pooling == "mean":
        from .pooled import MeanPooledClassifier

        encoder = _load(AutoModel, model, config, {*modules_to_save, "pooler"})
        return MeanPooledClassifier.on_encoder(encoder, id2label)
    config.id2label, config.label2id = id2label, {label: index for index, label in id2label.items()}
    config.problem_type = "single_label_classification"
    if config.pad_token_id is None:
        # a decoder classifies the last token that is not padding
        config.pad_token_id = tokenizer.pad_token_id
    # PEFT saves these two for every sequence classifier
    saved = {*modules_to_save, "classifier", "score"}
    return _in_full_precision(model, _load(AutoModelForSequenceClassification, model, config, saved))


def load_language_model(model: ModelSection, modules_to_save: Collection[str] = ()) -> PreTrainedModel:
    """The frozen causal language model."""
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, model, load_config(model), set(modules_to_save))


def load_seq2seq_model(model: ModelSection, modules_to_save: Collection[str] = ()) -> PreTrainedModel:
    """The frozen encoder and decoder."""
    from transformers import AutoModelForSeq2SeqLM

    loaded = _load(AutoModelForSeq2SeqLM, model, load_config(model), set(modules_to_save))
    return _in_full_precision(model, loaded)


def load_sentence_transformer(model: ModelSection) -> SentenceTransformer:
    """The embedding model, with the modules and settings that its folder or repository names."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            "task: embedding needs sentence-transformers: install dlor-peft with its extra 'embedding'"
        ) from error

    if model.weights == "identity":
        raise ValueError("model.weights: an embedding model starts from a checkpoint; drop identity.")
    load_config(model)
    return SentenceTransformer(
        resolve_path(model), revision=model.revision, model_kwargs=placement(model), config_kwargs=model.config
    ).eval()


def placement(model: ModelSection) -> dict[str, Any]:
    """The arguments of `from_pretrained` that say in which form and where the weights are held."""
    values = {
        "dtype": model.dtype,
        "quantization_config": build_quantization(model.quantization),
        "device_map": model.device_map,
        "offload_folder": model.offload_folder,
    }
    return {name: value for name, value in values.items() if value is not None}


def _load(auto_class: Any, model: ModelSection, config: PretrainedConfig, may_miss: set[str]) -> PreTrainedModel:
    if _without_weights.get():
        loaded = auto_class.from_config(config, **({} if model.dtype == "auto" else {"dtype": model.dtype}))
        # of the weights that identity would draw these are known without values; what a file has is not
        missing = embeddings(loaded) if model.weights == "identity" else []
        lack = "model.weights: identity leaves"
    elif model.weights == "identity":
        loaded, missing = build_identity(auto_class, config, model.dtype, may_miss)
        lack = "model.weights: identity leaves"
    else:
        placed = placement(model)
        if "quantization_config" in placed:
            _leave_out(placed["quantization_config"], auto_class, config, may_miss)
        loaded, info = auto_class.from_pretrained(
            resolve_path(model), config=config, revision=model.revision, output_loading_info=True, **placed
        )
        missing = info["missing_keys"]
        lack = "model.path: the checkpoint lacks"
    missing = sorted(key for key in missing if not may_miss & set(key.split(".")))
    if missing:
        raise ValueError(
            f"{lack} {len(missing)} weights, {', '.join(missing[:5])} first: drawn at random, they would differ at "
            "every load. Choose a checkpoint for this task, or train and save their modules too "
            "(adapter.modules_to_save)."
        )
    for module in loaded.modules():
        # bitsandbytes repacks 4-bit weights when a CPU first calls them in evaluation mode; no gradient passes those
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010
    return loaded


def _leave_out(quantization: Any, auto_class: Any, config: PretrainedConfig, saved: set[str]) -> None:
    """Modules that are trained in full are not quantised, nor, unless the recipe lists others, the output layer."""
    import torch
    from transformers.quantizers.base import get_keys_to_not_convert

    skipped = quantization.llm_int8_skip_modules
    if skipped is None:
        with torch.device("meta"):
            skipped = get_keys_to_not_convert(auto_class.from_config(config))
    quantization.llm_int8_skip_modules = sorted({*skipped, *saved})


def _in_full_precision(model: ModelSection, loaded: PreTrainedModel) -> PreTrainedModel:
    # what is not quantised, for transformers' own Trainer; TRL's trainers leave it as it is
    if not model.quantization:
        return loaded
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(loaded, use_gradient_checkpointing=False)
