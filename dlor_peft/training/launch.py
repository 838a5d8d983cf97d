"""`dlor train --launch`: the same command in N processes, started and watched by Accelerate's own launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
import yaml

from .folder import CHECKPOINT_MARK, RunFolder
from .processes import LOST
from .schema import Recipe
from .signals import stop_signals_to
from .sources import suggest

PACKAGED = {file.stem: file for file in sorted(Path(__file__).with_name("accelerate").glob("*.yaml"))}


def launch(name: str, processes: int | None, recipe: Recipe, command: Sequence[str]) -> int:
    """The exit code of `python -m dlor_peft.cli COMMAND` in several processes, that of the one that failed first.

    `name` is a packaged configuration (ddp, fsdp2, zero3) or the path of one of Accelerate's. Without an accelerator,
    or where the recipe says training.use_cpu, the processes are of the CPU and talk over gloo. SIGINT and SIGTERM are
    passed on to every process, which ends its step and saves.

    Raises:
        ValueError: a configuration that starts no processes, or their number is not known.
        FileNotFoundError: there is no such configuration.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    file, configuration = read_configuration(name)
    on_cpu = bool(recipe.training.get("use_cpu")) or not torch.accelerator.is_available()
    count = processes or configuration.get("num_processes") or (0 if on_cpu else torch.accelerator.device_count())
    if not count:
        raise ValueError("--launch: without an accelerator, say how many processes: --processes 2.")
    words = ["--config_file", str(file), "--num_processes", str(count)]
    alone = configuration.get("num_machines", 1) == 1
    if alone:
        words += ["--main_process_port", "0"]
    arguments = launch_command_parser().parse_args([*words, "--module", "dlor_peft.cli", *command])
    # torchrun's own options, which Accelerate hands through: a port that the rendezvous itself takes, so that runs
    # side by side do not meet; and no 30 seconds to death after Ctrl-C, which may be too few to save
    arguments.standalone = alone
    arguments.signals_to_handle = "SIGHUP,SIGQUIT"
    try:
        by_deepspeed = configuration["distributed_type"] == "DEEPSPEED"
        with _environment(on_cpu, by_deepspeed, count), stop_signals_to(_relay):
            launch_command(arguments)
    except ChildFailedError as error:
        return _exit_code(error.failures, RunFolder(recipe.output_dir))
    return 0


def read_configuration(name: str) -> tuple[Path, dict[str, Any]]:
    """The file of a configuration and what is in it; ValueError or FileNotFoundError as `launch`'s."""
    file = PACKAGED.get(name, Path(name).expanduser())
    if not file.is_file():
        raise FileNotFoundError(f"--launch: {name!r} is no file.{suggest(name, PACKAGED, 'Packaged configurations')}")
    try:
        configuration = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--launch: {file} is not valid YAML: {error}") from error
    kind = configuration.get("distributed_type") if isinstance(configuration, dict) else None
    if kind in (None, "NO", "MULTI_CPU"):
        raise ValueError(
            f"--launch: {file} has distributed_type {kind}, with which Accelerate starts one process or mpirun. Give "
            "one of MULTI_GPU, FSDP, DEEPSPEED; for processes of the CPU set training.use_cpu=true beside it."
        )
    return file, configuration


@contextmanager
def _environment(on_cpu: bool, by_deepspeed: bool, count: int) -> Iterator[None]:
    """What Accelerate's launcher reads or says by the environment, and what torch's logs of a failure."""
    former = dict(os.environ)
    if on_cpu:
        os.environ.update({"DS_ACCELERATOR": "cpu"} if by_deepspeed else {"ACCELERATE_USE_CPU": "true"})
        # one process a core would be many threads each
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    # each process has said what went wrong
    logger = logging.getLogger("torch.distributed")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        os.environ.clear()
        os.environ.update(former)


def _relay(number: int, frame: FrameType | None) -> None:
    children = psutil.Process().children()
    if not children:
        raise KeyboardInterrupt
    for child in children:
        child.send_signal(number)


def _exit_code(failures: dict[int, Any], folder: RunFolder) -> int:
    # a process that only lost its peers, or that the launcher ended, is not the reason
    def is_reason(rank: int) -> bool:
        return failures[rank].exitcode not in (LOST, -signal.SIGTERM)

    rank = min(failures, key=lambda rank: (not is_reason(rank), failures[rank].timestamp))
    code = failures[rank].exitcode
    if code < 0:
        number = signal.Signals(-code)
        reason = " (often for want of memory)" if number == signal.SIGKILL else ""
        goes_on = "To go on from the last checkpoint, run the same command with --resume."
        has_checkpoint = any(folder.checkpoints.glob(f"checkpoint-*/{CHECKPOINT_MARK}"))
        print(
            f"dlor: error: process {rank} was ended by {number.name}{reason}, so all were."
            f"{' ' + goes_on if has_checkpoint else ''}",
            file=sys.stderr,
        )
        return 128 + number
    return code
