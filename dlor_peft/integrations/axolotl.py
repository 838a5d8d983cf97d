"""`adapter: dlor` in axolotl, with every field of DLoRConfig as `dlor_<field>`.

    plugins: [dlor_peft.integrations.axolotl.DLoRPlugin]
    adapter: dlor
    dlor_r: 16
    dlor_target_modules: all-linear

Of axolotl's own names, only those that axolotl itself reads for every adapter apply: `lora_model_dir`, `lora_on_cpu`,
`lora_modules_to_save` and `peft_autocast_adapter_dtype`. The others are LoRA's, and refused rather than ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin  # pyright: ignore[reportMissingImports]
from peft import PeftModel, TaskType, get_peft_model
from pydantic import BaseModel, Field, create_model, model_validator

from ..config import DLoRConfig
from .settings import FIELDS, PREFIX, read

_ADAPTER = "dlor"
_PLACE = "dlor_peft.integrations.axolotl"
_SHARED = ("lora_model_dir", "lora_on_cpu", "lora_modules_to_save", "peft_autocast_adapter_dtype")
_TASKS = {"SequenceClassification": TaskType.SEQ_CLS, "TokenClassification": TaskType.TOKEN_CLS}


class DLoRPlugin(BasePlugin):
    """What axolotl asks a plugin for that brings an adapter of its own."""

    def get_input_args(self) -> str:
        return f"{_PLACE}.DLoRArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=_ADAPTER)]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, DLoRConfig] | None:
        """The model with a new adapter, or with the one in `lora_model_dir`; the config alone for TRL's trainers.

        None where the adapter is not DLoR, which leaves it to axolotl.

        Raises:
            ValueError: the adapter in `lora_model_dir` is another than the `dlor_` settings describe.
        """
        if cfg.adapter != _ADAPTER:
            return None
        settings = _settings(cfg.to_dict())
        task = next((task for name, task in _TASKS.items() if name in type(model).__name__), TaskType.CAUSAL_LM)
        config = DLoRConfig(task_type=task, **settings)
        if config_only:
            if cfg.lora_model_dir:
                raise ValueError(
                    f"{_PLACE}: with `rl: {cfg.rl}` axolotl starts a new adapter, but lora_model_dir is "
                    f"{cfg.lora_model_dir!r}. Merge that adapter into the base first (`dlor merge`), or leave it out."
                )
            return None, config
        options = {}
        if cfg.peft_autocast_adapter_dtype is not None:
            options["autocast_adapter_dtype"] = cfg.peft_autocast_adapter_dtype
        if cfg.lora_model_dir:
            if cfg.lora_on_cpu:
                options["torch_device"] = "cpu"
            model = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference, **options)
            config = _check_loaded(model, config, settings, cfg.lora_model_dir)
        else:
            model = get_peft_model(model, config, **options)
        if not cfg.local_rank:
            model.print_trainable_parameters()
        return model, config


def _settings(data: Mapping[str, Any]) -> dict[str, Any]:
    settings = read(data, _PLACE)
    # axolotl looks for it under this name where tokens are added, whatever the adapter
    saved = data.get("lora_modules_to_save")
    if saved and settings.setdefault("modules_to_save", saved) != saved:
        raise ValueError(
            f"{_PLACE}: dlor_modules_to_save is {settings['modules_to_save']!r}, but lora_modules_to_save is "
            f"{saved!r}. Give one of them."
        )
    return settings


def _check_loaded(model: PeftModel, config: DLoRConfig, settings: Mapping[str, Any], folder: str) -> DLoRConfig:
    loaded = model.peft_config["default"]
    if not isinstance(loaded, DLoRConfig):
        raise ValueError(
            f"{_PLACE}: the adapter in lora_model_dir {folder!r} is {loaded.peft_type!s}, not DLOR. Point it at a "
            "DLoR adapter, or set `adapter:` to what it is."
        )
    for name, field in FIELDS.items():
        # what is None by default chooses layers, and is saved as what it came to
        if field.name not in settings or field.default is None:
            continue
        given, present = getattr(config, field.name), getattr(loaded, field.name)
        if given != present:
            raise ValueError(
                f"{_PLACE}: {name} is {given!r}, but the adapter in lora_model_dir {folder!r} was trained with "
                f"{present!r}. Leave {name} out, or leave lora_model_dir out to start a new adapter."
            )
    return loaded


class _Checks(BaseModel):
    @model_validator(mode="before")
    @classmethod
    def check_dlor(cls, data: Any) -> Any:
        settings = _settings(data) if data.get("adapter") == _ADAPTER else read(data, _PLACE)
        if data.get("adapter") == _ADAPTER:
            _refuse(data)
            DLoRConfig(**settings)
        elif settings:
            raise ValueError(
                f"{_PLACE}: {', '.join(name for name in FIELDS if data.get(name) is not None)} given, but `adapter` "
                f"is {data.get('adapter')!r}. Set `adapter: {_ADAPTER}`, or leave them out."
            )
        return data


def _refuse(data: Mapping[str, Any]) -> None:
    """Raises for what axolotl does for its own adapters only, and would leave undone or do wrongly for this one."""
    for name, value in data.items():
        if name in _SHARED or (not name.startswith(("lora_", "loraplus_lr_ratio", "peft_")) and name != "peft"):
            continue
        # axolotl fills in a dropout of 0
        if value:
            own = PREFIX + name.partition("_")[2]
            hint = f"Use {own}" if own in FIELDS else "Leave it out: DLoR has no such setting"
            raise ValueError(f"{_PLACE}: {name} is LoRA's, and `adapter: {_ADAPTER}` does not read it. {hint}.")
    for name in ("load_in_4bit", "load_in_8bit"):
        if data.get(name):
            raise ValueError(
                f"{_PLACE}: {name} has no effect with `adapter: {_ADAPTER}`: axolotl quantises the base for lora and "
                "qlora only, and would load it unquantised. Leave it out, or use `dlor train` or TRL with a "
                "quantised base."
            )
    if data.get("merge_lora") and data.get("merge_method") != "legacy":
        raise ValueError(
            f"{_PLACE}: axolotl's merge_method 'memory_efficient' looks for LoRA's tensors, and would write the base "
            "model unchanged. Set `merge_method: legacy`, or use `dlor merge`, which does not load the model whole."
        )


DLoRArgs = create_model(
    "DLoRArgs",
    __base__=_Checks,
    __module__=__name__,
    # DLoRConfig checks the values
    **{name: (Any, Field(default=None, description=field.metadata["help"])) for name, field in FIELDS.items()},  # pyright: ignore
)
