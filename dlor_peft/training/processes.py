"""Several processes of one run: the main one speaks, writes and goes first."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch

from .signals import StoppedError

LOST = 75
"""Exit code of a process whose peers have gone."""

PATIENCE = 10.0
"""Seconds that another process waits before it reports an error: time for the main one to report the same, and for the
launcher to end all."""

Result = TypeVar("Result")


def num_processes() -> int:
    """By the environment that Accelerate's and torch's launchers make."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def rank() -> int:
    return int(os.environ["RANK"]) if num_processes() > 1 else 0


def is_main() -> bool:
    return rank() == 0


def run_one(function: Callable[[], int], report: Callable[[BaseException], int]) -> int:
    """The exit code of this process, one of several. Of an error that all have, the main process tells.

    A process that fails ends here, without a return; the launcher then ends the others, wherever they wait for it.
    """
    _silence_others()
    try:
        code = function()
    except StoppedError as error:
        # all processes are here, as at the end
        code = report(error) if is_main() else 128 + signal.SIGINT
        wait_for_all()
    except BaseException as error:
        _end(_reported(error, report))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return code


def _reported(error: BaseException, report: Callable[[BaseException], int]) -> int:
    if is_lost_connection(error):
        if is_main():
            print(f"dlor: the processes lost each other: {' '.join(str(error).split())}", file=sys.stderr)
        return LOST
    if not is_main():
        # the main process mostly fails with the same, and the launcher ends this one while it waits
        time.sleep(PATIENCE if os.environ["LOCAL_RANK"] == "0" else 2 * PATIENCE)
    try:
        return report(error)
    except BaseException as unexpected:
        # torch's says which process
        sys.excepthook(type(unexpected), unexpected, unexpected.__traceback__)
        return 1


def _end(code: int) -> NoReturn:
    """At once. To destroy the group could wait for processes that wait for this one; with the group, the threads of
    gloo abort the interpreter's own end."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _silence_others() -> None:
    """Only the main process prints and warns; errors are never silenced."""
    if is_main():
        return
    import datasets
    import transformers

    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone."""
    if isinstance(error, torch.distributed.DistError):
        return True
    message = re.compile("gloo|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)
    return isinstance(error, RuntimeError) and bool(message.search(str(error)))


def main_first(function: Callable[[], Result]) -> Result:
    """The function's result on every process; the others find what the main one has downloaded or cached."""
    if num_processes() == 1:
        return function()
    from accelerate import PartialState

    with PartialState().main_process_first():
        return function()


def decided_by_main(function: Callable[[], Any]) -> Any:
    """The main process's result, on every process."""
    if num_processes() == 1:
        return function()
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([function() if is_main() else None])[0]


def wait_for_all() -> None:
    if num_processes() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def holds_weights() -> bool:
    """Whether a model that was just loaded has its weights here: FSDP may leave them to one process of a machine."""
    from accelerate.utils import parse_flag_from_env

    spared = parse_flag_from_env("ACCELERATE_USE_FSDP") and parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING")
    return num_processes() == 1 or not spared or os.environ["LOCAL_RANK"] == "0"


def deepspeed_on_cpu() -> dict[str, Any]:
    """Training arguments with which Accelerate hands processes of the CPU to DeepSpeed: use_cpu would exclude it."""
    from accelerate.utils import parse_flag_from_env

    if num_processes() == 1 or not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") or torch.accelerator.is_available():
        return {}
    return {"use_cpu": False, "ddp_backend": "gloo"}
