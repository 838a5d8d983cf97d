"""The Triton kernels for tests: as they are on a GPU, and through Triton's interpreter where there is none."""

import importlib
import sys
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _why_not() -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed"
    import triton

    if DEVICE == "cpu" and triton.__version__ < "3.7":
        return "the interpreter before Triton 3.7 does not work with NumPy 2.4"
    return None


WHY_NOT = _why_not()
"""Why there are none, or None."""


@cache
def kernels() -> ModuleType:
    """kernels.triton; interpreted where there is no GPU, without a trace in the modules that other tests see."""
    import triton

    name = "dlor_peft.kernels.triton"
    if DEVICE == "cuda":
        return importlib.import_module(name)
    names = (name, f"{name}_kernels")
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    # asked for when a kernel is decorated; TRITON_INTERPRET would also change the kernels that torch brings
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        module = importlib.import_module(name)
    # for any other function the interpreter adds up number by number
    sys.modules[names[1]].add = triton.language.standard._sum_combine
    package = sys.modules["dlor_peft.kernels"]
    for name in names:
        del sys.modules[name]
        delattr(package, name.rpartition(".")[2])
    for name, previous in before.items():
        sys.modules[name] = previous
        setattr(package, name.rpartition(".")[2], previous)
    return module
