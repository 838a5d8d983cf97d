"""`--tuner_type dlor` in ms-swift, with the fields of DLoRConfig as `dlor_<field>` in `--model_kwargs`.

    swift sft --external_plugins .../dlor_peft/integrations/ms_swift.py --tuner_type dlor \\
        --target_modules all-linear --model_kwargs '{"dlor_r": 16, "dlor_mode": "scaled"}' ...

Swift runs its plugins, and running this file registers the tuner: a plugin of your own may say `import
dlor_peft.integrations.ms_swift` instead. What is adapted is chosen by swift's options: `--target_modules`,
`--target_regex`, `--target_parameters`, `--modules_to_save` and `--freeze_llm`, `--freeze_vit`, `--freeze_aligner`.
The adapter remembers the rest: `swift infer` and `swift export` find the plugin in the checkpoint's args.json.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from peft import PeftModel, get_peft_model
from swift.arguments import SftArguments  # pyright: ignore[reportMissingImports]
from swift.pipelines.train.tuner import (  # pyright: ignore[reportMissingImports]
    get_modules_to_save,
    get_target_modules,
)
from swift.tuner_plugin import PeftTuner, tuners_map  # pyright: ignore[reportMissingImports]

# swift runs this file outside its package
from dlor_peft.config import DLoRConfig
from dlor_peft.integrations.settings import PREFIX, read

_NAME = "dlor"
_PLACE = "dlor_peft.integrations.ms_swift"
_ELSEWHERE = {
    "target_modules": "--target_modules or --target_regex",
    "target_parameters": "--target_parameters",
    "modules_to_save": "--modules_to_save",
}
# swift's tasks that are none of PEFT's
_TASKS = {"EMBEDDING": None, "RERANKER": "SEQ_CLS", "GENERATIVE_RERANKER": "CAUSAL_LM", "DECISION": "CAUSAL_LM"}
_OF_LORA = ("lora_", "lorap_", "use_rslora", "use_dora", "init_weights")


class DLoRTuner(PeftTuner):
    """Swift saves and loads it as it does any PEFT model."""

    @staticmethod
    def prepare_model(args: Any, model: Any) -> PeftModel:
        """The model with a new adapter.

        Raises:
            ValueError: an option or setting that DLoR does not have.
        """
        _refuse(args)
        task = args.task_type.upper()
        task = _TASKS.get(task, task)
        config = DLoRConfig(
            task_type=task,
            target_modules=get_target_modules(args, model),
            target_parameters=args.target_parameters,
            modules_to_save=get_modules_to_save(args, model, task) or None,
            **read(args.model_kwargs, f"{_PLACE}: --model_kwargs", _ELSEWHERE),
        )
        return get_peft_model(model, config)


def _refuse(args: Any) -> None:
    """Raises for options of swift's LoRA that are not what they are by default: nothing would read them."""
    for field in dataclasses.fields(SftArguments):
        if not field.name.startswith(_OF_LORA) or field.default is dataclasses.MISSING:
            continue
        value = getattr(args, field.name)
        # swift makes a bool of "true"
        if str(value).lower() != str(field.default).lower():
            raise ValueError(
                f"{_PLACE}: --{field.name} is {value!r}, which is LoRA's, and --tuner_type {_NAME} does not read it. "
                f"""Leave it out; DLoR's settings go into --model_kwargs '{{"{PREFIX}r": 16}}'."""
            )
    if args.use_swift_lora or args.tuner_backend != "peft":
        raise ValueError(
            f"{_PLACE}: --tuner_backend is {args.tuner_backend!r} and --use_swift_lora {args.use_swift_lora}, but "
            "DLoR is a method of PEFT. Leave both out."
        )


tuners_map[_NAME] = DLoRTuner
