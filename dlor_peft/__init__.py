"""DLoR, a trainable diagonal plus low rank (arXiv 2605.05659), as a method of Hugging Face PEFT.

Importing this package makes "DLOR" a PEFT method: `get_peft_model`, `PeftModel.from_pretrained` and every other loader
of PEFT and transformers know it from then on.
"""

import importlib
import os
import sys
import sysconfig
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cap import limit_ratio
    from .config import DLoRConfig
    from .initialisation import initialize_from_data
    from .layers import DLoRLayer
    from .model import DLoRModel
    from .optimiser import create_dlor_optimizer, parameter_groups
    from .registration import register

__version__ = "0.1.0"
__all__ = [
    "DLoRConfig",
    "DLoRLayer",
    "DLoRModel",
    "__version__",
    "create_dlor_optimizer",
    "initialize_from_data",
    "limit_ratio",
    "parameter_groups",
    "register",
]

_HOME = {
    "DLoRConfig": "config",
    "DLoRLayer": "layers",
    "DLoRModel": "model",
    "create_dlor_optimizer": "optimiser",
    "initialize_from_data": "initialisation",
    "limit_ratio": "cap",
    "parameter_groups": "optimiser",
    "register": "registration",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def _is_command_line() -> bool:
    """Whether this process is the `dlor` command, which parses its arguments before it loads torch and PEFT."""
    script = next(iter(sys.argv), "")
    if script == "-m":
        return "dlor_peft.cli" in sys.orig_argv
    own = os.path.join(sysconfig.get_path("scripts"), "dlor")
    return os.path.splitext(os.path.realpath(script))[0] == os.path.realpath(own)


if not _is_command_line():
    __getattr__("register")()
