"""Makes "DLOR" a genuine PEFT method. The only file that reaches into PEFT's registry."""

import functools
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, Union

from peft import PeftMixedModel, PeftModel, helpers
from peft import __version__ as peft_version
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners import mixed
from peft.tuners.lora import LoraLayer
from peft.tuners.mixed import model as mixed_model
from peft.utils import hotswap as peft_hotswap
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.integrations.peft import PeftAdapterMixin

from . import card, hotswap, mixing
from .config import DLoRConfig
from .layers import DLoRLayer
from .layers.start import loading
from .model import DLoRModel

_NAME = "DLOR"


def register() -> None:
    """PeftType.DLOR exists, and PEFT maps it to DLoRConfig and DLoRModel.

    Idempotent; after a reload of this package PEFT maps to the newly loaded classes.

    Raises:
        ImportError: another package, PEFT itself included, already provides a method of this name.
    """
    if _NAME not in PeftType.__members__:
        _add_member(PeftType, _NAME)
    peft_type = PeftType[_NAME]
    present = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if present is None:
        register_peft_method(name=_NAME.lower(), config_cls=DLoRConfig, model_cls=DLoRModel, is_mixed_compatible=True)
    elif present.__module__.partition(".")[0] == __package__:
        PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = DLoRConfig
        PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = DLoRModel
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING[peft_type] = DLoRModel
    else:
        raise ImportError(
            f"dlor_peft.registration: the PEFT method {_NAME!r} is already provided by `{present.__module__}`. Both "
            f"cannot be used in one process: uninstall dlor-peft and use that one, or do not import dlor_peft."
        )
    _enable_hotswap(peft_type)
    _enable_rescaling()
    _enable_mixing(peft_type)
    _enable_cards()
    _enable_loading()
    _refuse_shards()


def _enable_hotswap(peft_type: PeftType) -> None:
    """`peft.utils.hotswap`, which is written for LoRA, hands DLoR to `dlor_peft.hotswap`.

    Whoever has imported a function of it before gets the same, but for `hotswap_adapter_from_state_dict`, which fails.
    """
    # PEFT compares with the active adapter, which need not be the one to swap: `hotswap` compares with that
    peft_hotswap.CONFIG_KEYS_TO_CHECK[peft_type] = []
    _route(
        peft_hotswap,
        hotswap.hotswap_adapter_from_state_dict,
        lambda model, state_dict, adapter_name, config, *args, **kwargs: _is_ours(config),
    )
    # what `prepare_model_for_compiled_hotswap` calls to find the layers; DLoR's scales stay as they are
    _wrap(
        peft_hotswap,
        "_convert_scalings_to_tensor",
        lambda original: lambda model: original(model) or _has_layer(model),
    )
    _wrap(
        peft_hotswap,
        "_pad_lora_weights",
        lambda original: (
            lambda model, target_rank: any([hotswap.pad_ranks(model, target_rank), original(model, target_rank)])
        ),
    )


def _enable_rescaling() -> None:
    """`peft.helpers.rescale_adapter_scale`, which asks for LoRA's layers, rescales DLoR's too."""
    helpers.LoraLayer = (LoraLayer, DLoRLayer)  # pyright: ignore[reportPrivateImportUsage]


def _enable_mixing(peft_type: PeftType) -> None:
    """`PeftMixedModel`, which lists the methods that it mixes, lists DLoR, and nests it as `dlor_peft.mixing` says."""
    types = dict.fromkeys((*mixed_model.COMPATIBLE_TUNER_TYPES, peft_type))
    mixed.COMPATIBLE_TUNER_TYPES = mixed_model.COMPATIBLE_TUNER_TYPES = tuple(types)
    mixed_model.PREFIXES = list(dict.fromkeys([*mixed_model.PREFIXES, DLoRModel.prefix]))
    mixed_model.Configs = Union[mixed_model.Configs, DLoRConfig]  # noqa: UP007
    mixed_model.Layers = (*dict.fromkeys([*mixed_model.Layers, DLoRLayer]),)
    model = mixed_model.MixedModel
    _route(model, DLoRModel._create_and_replace, lambda self, config, *args, **kwargs: _is_ours(config))
    _route(model, mixing._prepare_model, lambda self, config, model: _is_ours(config) or _has_layer(model))
    for function in (mixing.merge_adapter, mixing._unload_and_optionally_merge):
        _route(model, function, lambda self, *args, **kwargs: _has_layer(self))


def _enable_cards() -> None:
    """What PEFT writes into a model card is followed by what DLoR does, and reaches the Hub.

    `push_to_hub` replaces the card that the model has just saved by the repository's former one or a template of
    transformers. `Trainer.push_to_hub` writes its own, and has PEFT update it.
    """

    def write_card(original: Callable) -> Callable:
        def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
            if not _has_config(self):
                return original(self, output_dir)
            # PEFT replaces the tags
            tags = card.read_tags(output_dir)
            original(self, output_dir)
            return card.describe(output_dir, tags=tags)

        return create_or_update_model_card

    def upload(original: Callable) -> Callable:
        def _upload_modified_files(self: Any, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
            if _has_config(self):
                if isinstance(self, PeftModel):
                    self.create_or_update_model_card(working_dir)
                card.describe(working_dir, source=repo_id)
            return original(self, working_dir, repo_id, *args, **kwargs)

        return _upload_modified_files

    _wrap(PeftModel, "create_or_update_model_card", write_card)
    _wrap(PeftModel, "_upload_modified_files", upload)
    _wrap(PreTrainedModel, "_upload_modified_files", upload)


def _enable_loading() -> None:
    """What is loaded is not given a start first: PEFT adds an adapter alike whether it is new or to be loaded."""

    def load(original: Any) -> Callable:
        original = getattr(original, "__func__", original)

        @functools.wraps(original)
        def load_adapter(*args: Any, **kwargs: Any) -> Any:
            with loading():
                return original(*args, **kwargs)

        return load_adapter

    for owner in (PeftModel, PeftMixedModel):
        _wrap(owner, "from_pretrained", load, classmethod)
    for owner in (PeftModel, PeftAdapterMixin):
        _wrap(owner, "load_adapter", load)


def _refuse_shards() -> None:
    """`save_pretrained` says what to do where FSDP shards the adapter, which safetensors refuses in its own words."""

    def gathered(original: Callable) -> Callable:
        def save_pretrained(self: PeftModel, *args: Any, **kwargs: Any) -> None:
            sharded = kwargs.get("state_dict") is None and any(
                isinstance(parameter, DTensor) for name, parameter in self.named_parameters() if ".dlor_" in name
            )
            if sharded:
                raise ValueError(
                    "dlor_peft: FSDP shards this adapter, no process has it whole. On all processes call "
                    "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options=StateDictOptions("
                    "full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)), then on one of them "
                    "model.save_pretrained(folder, state_dict=...). `dlor train` does so by itself."
                )
            return original(self, *args, **kwargs)

        return save_pretrained

    _wrap(PeftModel, "save_pretrained", gathered)


def _has_config(model: Any) -> bool:
    """Whether one of the adapters of a PeftModel or of transformers' own integration is DLoR's."""
    return any(_is_ours(config) for config in getattr(model, "peft_config", {}).values())


def _has_layer(model: Any) -> bool:
    return any(isinstance(module, DLoRLayer) for module in model.modules())


def _is_ours(config: Any) -> bool:
    return isinstance(config, DLoRConfig)


def _route(owner: ModuleType | type, function: Callable, applies: Callable[..., bool]) -> None:
    """Calls of `owner`'s function of that name go to `function` where `applies` to the arguments."""

    def choose(original: Callable) -> Callable:
        return lambda *args, **kwargs: (function if applies(*args, **kwargs) else original)(*args, **kwargs)

    _wrap(owner, function.__name__, choose)


def _wrap(
    owner: ModuleType | type,
    name: str,
    wrap: Callable[[Callable], Callable],
    kind: Callable[[Callable], Any] = lambda function: function,
) -> None:
    """`owner`'s function of that name is what `wrap` makes of it, as `kind` (classmethod) has it."""
    original = getattr(owner, name, None)
    if original is None:
        warnings.warn(
            f"dlor_peft.registration: PEFT {peft_version} has no {owner.__name__}.{name}, by which DLoR's part in "
            "hot-swapping, PeftMixedModel, loading or the model cards on the Hub is reached: they do not know DLoR. "
            "All else works; see the README for the versions of PEFT that were tested.",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    # a reload of this package replaces what the former one made
    original = getattr(original, "_without_dlor", original)
    wrapped = functools.wraps(original)(wrap(original))
    wrapped._without_dlor = original  # pyright: ignore[reportAttributeAccessIssue]
    setattr(owner, name, kind(wrapped))


def _add_member(enum_class: type[PeftType], name: str) -> None:
    """Extend the str-enum by a member whose value is its name, as `name = "name"` in its class body would."""
    member = str.__new__(enum_class, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = enum_class  # pyright: ignore[reportAttributeAccessIssue]
    member._sort_order_ = len(enum_class.__members__)  # pyright: ignore[reportAttributeAccessIssue]
    enum_class._member_names_.append(name)
    enum_class._member_map_[name] = member
    enum_class._value2member_map_[name] = member
    # Enum's metaclass forbids setattr for members, and lookup by attribute needs one from Python 3.12 on
    type.__setattr__(enum_class, name, member)
