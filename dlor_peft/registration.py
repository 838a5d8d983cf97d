"""Makes "DLOR" a genuine PEFT method. The only file that reaches into PEFT's registry."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

from .config import DLoRConfig
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
        register_peft_method(name=_NAME.lower(), config_cls=DLoRConfig, model_cls=DLoRModel)
    elif present.__module__.partition(".")[0] == __package__:
        PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = DLoRConfig
        PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = DLoRModel
    else:
        raise ImportError(
            f"dlor_peft.registration: the PEFT method {_NAME!r} is already provided by `{present.__module__}`. Both "
            f"cannot be used in one process: uninstall dlor-peft and use that one, or do not import dlor_peft."
        )


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
