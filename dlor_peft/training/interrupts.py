"""Ctrl-C, or a scheduler's SIGTERM, ends the current step and saves; a second one ends at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from .processes import is_main
from .signals import stop_signals_to

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments


class Interrupts(TrainerCallback):
    """All processes stop after the same step, whichever of them got the signal."""

    def __init__(self, trainer: Trainer) -> None:
        self.stopped_at: int | None = None
        self._trainer = trainer
        self._asked = False
        self._can_save = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While the block runs, signals are requests. Only the main thread can ask for that."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        owner = os.getpid()

        def ask(number: int, frame: FrameType | None) -> None:
            if self._asked or not self._can_save or os.getpid() != owner:
                # before the first step there is nothing to save; a data loader's worker inherits this handler
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
                signal.raise_signal(number)
            self._asked = True
            if is_main():
                name = signal.Signals(number).name
                print(
                    f"dlor: {name}: this step ends, then a checkpoint is saved. Once more ends at once.",
                    file=sys.stderr,
                )

        with stop_signals_to(ask):
            yield

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._can_save = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        accelerator = self._trainer.accelerator
        if self._asked:
            accelerator.set_trigger()
        # after the last step there is nothing to stop
        if accelerator.check_trigger() and state.global_step < state.max_steps:
            self.stopped_at = state.global_step
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.stopped_at is not None:
            # the Trainer calls this for an epoch that is broken off too
            control.should_save = control.should_evaluate = False
