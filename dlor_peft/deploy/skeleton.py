"""A model without its weights, on the meta device, with adapters on it: what it says becomes of each weight."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from peft import PeftModel, TaskType, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ..layers import DLoRLayer
from .adapter import PREFIX, SavedAdapter
from .checkpoint import Checkpoint

_AUTO = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}
_WITH_LABELS = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS)


@dataclass
class Change:
    """What the adapters do to one parameter: put another in its place, adapt it, put rows in the place of some."""

    replacement: Tensor | None = None
    layer: DLoRLayer | None = None
    adapters: list[str] = field(default_factory=list)
    tokens: list[tuple[list[int], Tensor]] = field(default_factory=list)

    def is_same(self, other: Change) -> bool:
        """Whether equal weights stay equal: for layers that share theirs."""
        layers = [change.layer._weight_owner if change.layer else None for change in (self, other)]
        if layers[0] is not layers[1] or self.adapters != other.adapters:
            return False
        if (self.replacement is None) != (other.replacement is None) or len(self.tokens) != len(other.tokens):
            return False
        if self.replacement is not None and not torch.equal(self.replacement, other.replacement):  # pyright: ignore
            return False
        return all(
            mine == theirs and torch.equal(rows, their_rows)
            for (mine, rows), (theirs, their_rows) in zip(self.tokens, other.tokens, strict=True)
        )


class Skeleton:
    """The model that adapters were trained on, with them, and without any of its own weights.

    model       the bare model, which transformers saves and loads
    changes     name of a parameter -> what becomes of it
    ties        names that share one parameter
    """

    def __init__(self, base: Checkpoint, adapters: Sequence[SavedAdapter]) -> None:
        """ValueError where an adapter does not fit the model, or two of them do not go together."""
        self.model = bare_model(base, adapters)
        self.parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self.ties = tied_names(self.model)
        # PEFT changes the one that it wraps
        wrapped = copy.deepcopy(self.model)
        self._names = {module: name for name, module in wrapped.named_modules()}
        self.changes: defaultdict[str, Change] = defaultdict(Change)
        # no piece of the prefix "dlor_", which is no name for an adapter
        self.names = [f"adapter{index}" for index in range(len(adapters))]
        self.peft_model = self._adapted(wrapped, adapters)

    @property
    def layers(self) -> dict[str, DLoRLayer]:
        """The adapted layers by the name of their module in the model."""
        modules = self.peft_model.named_modules()
        return {
            name.removeprefix(PREFIX).replace(".base_layer", ""): module
            for name, module in modules
            if isinstance(module, DLoRLayer)
        }

    def _adapted(self, wrapped: PreTrainedModel, adapters: Sequence[SavedAdapter]) -> PeftModel:
        model: Any = None
        for name, adapter in zip(self.names, adapters, strict=True):
            # PEFT moves there what it has allocated, whatever ranks the configuration asks for
            with torch.device("meta"), warnings.catch_warnings():
                # of tied weights, which are looked after here
                warnings.filterwarnings("ignore", ".*tie", UserWarning)
                try:
                    if model is None:
                        model = PeftModel(wrapped, adapter.config, name, low_cpu_mem_usage=True)
                    else:
                        model.add_adapter(name, adapter.config, low_cpu_mem_usage=True)
                except ValueError as error:
                    raise ValueError(f"{adapter.source} does not fit {self.model.name_or_path}: {error}") from error
            expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
            self._check(adapter, expected)
            self._take(model, name, adapter.state_dict)
        return model.eval()

    def _check(self, adapter: SavedAdapter, expected: Mapping[str, Tensor]) -> None:
        """ValueError unless the adapter stores what it has on this model and nothing else, embeddings aside."""
        stored = adapter.state_dict
        missing = [key for key in expected if key not in stored]
        if missing:
            raise ValueError(
                f"{adapter.source} lacks {len(missing)} of {len(expected)} tensors that its configuration has on "
                f"{self.model.name_or_path}, the first one {missing[0]}. Its two files do not belong together, the "
                "save was incomplete, or the base is another."
            )
        for key, tensor in stored.items():
            fits = expected.get(key, self.parameters.get(_name_of(key)))
            if fits is None:
                raise ValueError(
                    f"{adapter.source} has a tensor {key}, of shape {tuple(tensor.shape)}, that is nothing in "
                    f"{self.model.name_or_path} ({type(self.model).__name__}). Is the base the one it was trained on?"
                )
            if fits.shape != tensor.shape:
                raise ValueError(
                    f"{adapter.source} does not fit {self.model.name_or_path}: {key} has the shape "
                    f"{tuple(tensor.shape)}, and the base needs {tuple(fits.shape)}."
                )

    def _take(self, model: PeftModel, adapter: str, stored: dict[str, Tensor]) -> None:
        """Sort the stored tensors into `changes`. PEFT would put them where the weights are, on the meta device."""
        tied_tokens = []
        # with bias "all", PEFT stores the biases of both once more
        within = []
        for key, module in model.named_modules():
            if isinstance(module, DLoRLayer) and adapter in module.form:
                for factor in module.form[adapter].shapes:
                    factors: Any = getattr(module, factor)
                    # a tied layer has the factors of another
                    if (tensor := stored.pop(f"{key}.{factor}.weight", None)) is not None:
                        factors[adapter].weight = nn.Parameter(tensor, requires_grad=False)
                change = self.changes[f"{self._names[module.get_base_layer()]}.{module.parameter_name}"]
                change.layer = module
                change.adapters.append(adapter)
            elif isinstance(module, ModulesToSaveWrapper):
                name = self._names[module.original_module]
                within += [f"{key}.original_module.", f"{key}.modules_to_save."]
                for part in module.adapter_state_dict_load_map(adapter):
                    if (tensor := stored.pop(f"{key}.{part}", None)) is not None:
                        self._replace(f"{name}.{part}", tensor)
            elif isinstance(module, TrainableTokensWrapper):
                name = f"{self._names[module.original_module]}.weight"
                layer: Any = module.token_adapter
                # a tied layer has the rows of another
                if layer.tied_adapter:
                    tied_tokens.append((name, layer.tied_adapter))
                elif adapter in layer.trainable_tokens_delta:
                    rows = stored.pop(f"{key}.token_adapter.trainable_tokens_delta")
                    self._add_tokens(name, layer.token_indices[adapter], rows)
        for name, source in tied_tokens:
            tokens = self.changes[f"{self._names[source.base_layer]}.weight"].tokens
            self.changes[name].tokens = list(tokens)
        # trained biases, and embeddings that are saved besides
        for key, tensor in stored.items():
            if not key.startswith(tuple(within)):
                self._replace(_name_of(key), tensor)

    def _replace(self, name: str, tensor: Tensor) -> None:
        before = self.changes[name].replacement
        if before is not None and not torch.equal(before, tensor):
            raise ValueError(
                f"two of the adapters bring {name} in full, and differ in it: only one of them can be merged."
            )
        self.changes[name].replacement = tensor

    def _add_tokens(self, name: str, indices: list[int], rows: Tensor) -> None:
        num_rows = self.parameters[name].shape[0]
        if (highest := max(indices, default=0)) >= num_rows:
            raise ValueError(
                f"an adapter trains token {highest} of {name}, which has {num_rows} rows in {self.model.name_or_path}."
            )
        tokens = self.changes[name].tokens
        if {index for others, _ in tokens for index in others} & set(indices):
            raise ValueError(f"two of the adapters train the same token of {name}: only one of them can be merged.")
        tokens.append((indices, rows))


def tied_names(model: PreTrainedModel) -> list[list[str]]:
    """The names of each parameter that has several."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    return [of_one for of_one in names.values() if len(of_one) > 1]


def _name_of(key: str) -> str:
    """The name in the bare model of a tensor that is saved in full."""
    return key.removeprefix(PREFIX).replace(".base_layer", "")


def bare_model(base: Checkpoint, adapters: Sequence[SavedAdapter]) -> PreTrainedModel:
    """The model that the adapters were trained on, on the meta device."""
    config = _config(base)
    task, cls = _model_class(config, adapters, base.folder.source)
    labels = {count for adapter in adapters if (count := _num_labels(adapter))}
    if task in _WITH_LABELS and labels and labels != {config.num_labels}:
        if len(labels) > 1:
            raise ValueError(f"the adapters have classification heads for {sorted(labels)} labels: they do not mix.")
        config.num_labels = labels.pop()
    model = _on_meta(cls, config)
    embedding: Any = None
    # a model of images or sound may have none, and says it that way
    with suppress(NotImplementedError):
        embedding = model.get_input_embeddings()
    key = next((f"{name}.weight" for name, module in model.named_modules() if module is embedding), None)
    for adapter in adapters:
        for name in (key, key and key.replace(".weight", ".base_layer.weight")):
            trained = adapter.others.get(name or "")
            if trained is not None and trained.shape[0] != embedding.weight.shape[0]:
                # tokens were added before the training
                config.get_text_config().vocab_size = trained.shape[0]
                model = _on_meta(cls, config)
    model.name_or_path = base.folder.source
    return model


def _config(base: Checkpoint) -> Any:
    path = base.folder.path
    try:
        # a model that brings its own code is none of transformers'
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        # whatever a field of the wrong kind leads to
        raise ValueError(f"{path / 'config.json'} is of no model that transformers knows: {error}") from error


def _on_meta(cls: Any, config: PretrainedConfig) -> PreTrainedModel:
    make = cls.from_config if cls.__name__.startswith("Auto") else cls._from_config
    try:
        with torch.device("meta"):
            model = make(config)
    except Exception as error:
        # sizes that do not go together
        raise ValueError(f"config.json of the base does not make a {cls.__name__}: {error}") from error
    model.tie_weights()
    return model


def _model_class(config: PretrainedConfig, adapters: Sequence[SavedAdapter], source: str) -> tuple[Any, Any]:
    """The task, and the class that the adapters were trained on: of their task, or their record, or the base's."""
    tasks = {adapter.config.task_type for adapter in adapters}
    if len(tasks) > 1:
        raise ValueError(f"the adapters are of several tasks, {sorted(map(str, tasks))}, and so of several models.")
    task = tasks.pop() if tasks else None
    auto = getattr(transformers, _AUTO[TaskType(task)]) if task else None
    if auto is not None and type(config) in auto._model_mapping:
        return task, auto
    recorded = {(adapter.config.auto_mapping or {}).get("base_model_class") for adapter in adapters} - {None}
    names = [*recorded, *(config.architectures or ())]
    for name in names:
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel) and isinstance(config, cls.config_class or ()):
            return task, cls
    raise ValueError(
        f"{source} is a {', '.join(names) or 'model of unknown class'}, which is none of transformers' models. Load "
        "it with the adapter in Python, and call merge_and_unload."
    )


def _num_labels(adapter: SavedAdapter) -> int | None:
    """The outputs of a classification head that was trained with the adapter: of its matrices, the lowest.

    A square one is the dense layer that some heads begin with, where there is another.
    """
    heads = adapter.config.modules_to_save or ()
    shapes = [
        tensor.shape
        for name, tensor in adapter.others.items()
        if tensor.ndim == 2 and any(f".{head}." in f".{name}" for head in heads)
    ]
    return min((rows for rows, columns in shapes if rows != columns), default=shapes[0][0] if shapes else None)
