"""A checkpoint is complete when its adapter has been verified and its mark, written last, says so."""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import shutil
import traceback
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from .folder import CHECKPOINT_MARK, RunFolder, atomic, changed_keys
from .processes import decided_by_main, is_main, num_processes, wait_for_all

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from .schema import Recipe

FREE = (
    "output_dir",
    "verify",
    "training.report_to",
    "training.disable_tqdm",
    "training.save_total_limit",
)
"""What a recipe may change where it resumes: none of it decides what is trained."""

Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A complete one."""

    path: Path
    step: int
    num_keys: int
    files: list[str]
    """All others in it, by their names from its folder on: what the run goes on from."""

    devices: dict[str, Any]
    """How many processes wrote it, and how the model was spread over them."""

    recipe: dict[str, Any]
    start: dict[str, Any]
    """What was measured before the first step."""

    epoch_rng: str
    """State of torch's generator at the start of the epoch, of which its order of rows is drawn; base64."""

    @classmethod
    def read(cls, path: Path) -> Checkpoint | None:
        """None where the mark is missing; ValueError where it cannot be read, or is of another version."""
        mark = path / CHECKPOINT_MARK
        if not mark.is_file():
            return None
        try:
            return cls(path, **json.loads(mark.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"--resume: {mark} is damaged, or was written by another version of dlor-peft: {error}. Move the "
                "folder away to resume from the checkpoint before it, or start anew with --overwrite."
            ) from error

    def write(self) -> None:
        facts = dataclasses.asdict(self)
        del facts["path"]
        with atomic(self.path / CHECKPOINT_MARK) as partial:
            partial.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def last_complete(folder: RunFolder) -> tuple[Checkpoint | None, list[Path]]:
    """The last complete checkpoint, and the folders after it that are not complete."""
    names = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.checkpoints.glob("checkpoint-*")}
    steps = {int(name[1]): path for path, name in names.items() if name}
    later = []
    for step in sorted(steps, reverse=True):
        if checkpoint := Checkpoint.read(steps[step]):
            return checkpoint, later
        later.append(steps[step])
    return None, later


def find_checkpoint(folder: RunFolder, recipe: Recipe) -> tuple[Checkpoint, list[Path]]:
    """`last_complete`, of this recipe.

    Raises:
        ValueError: there is none, or it is of another recipe.
    """
    checkpoint, later = last_complete(folder)
    if checkpoint is None:
        raise ValueError(
            f"--resume: {folder.checkpoints} holds no complete checkpoint. Start anew without --resume"
            f"{' and with --overwrite' if later else ''}; training.save_strategy says when a run saves."
        )
    if lost := [file for file in checkpoint.files if not (checkpoint.path / file).is_file()]:
        raise ValueError(
            f"--resume: {checkpoint.path} lacks {lost[0]}, which was in it when it was saved: the run would not go on "
            "as it was. Move the folder away to resume from the checkpoint before it, or start anew with --overwrite."
        )
    wanted = recipe.model_dump(mode="json")
    if changed := [name for name in changed_keys(wanted, checkpoint.recipe) if name not in FREE]:
        raise ValueError(
            f"--resume: {checkpoint.path} is of another recipe (different: {', '.join(changed)}). Resume with the "
            "recipe of that run, which recipe.yaml in its folder holds, or choose another folder (output_dir=OTHER)."
        )
    return checkpoint, later


def checkpoint_to_resume(folder: RunFolder, recipe: Recipe) -> Checkpoint:
    """The last complete checkpoint; later folders, of saves that were cut off, are removed."""
    checkpoint, later = find_checkpoint(folder, recipe)
    for path in later:
        print(f"{path} is not complete: removed")
        shutil.rmtree(path)
    return checkpoint


def adapter_shapes(model: PeftModel) -> Shapes:
    """What a saved adapter must hold: each tensor's key and shape. Of a model that is not sharded by FSDP yet."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {key: tuple(getattr(tensor, "ds_shape", tensor.shape)) for key, tensor in state.items()}


def verify_adapter(folder: Path, expected: Shapes) -> int:
    """The number of tensors in a saved adapter.

    Raises:
        ValueError: one is missing, is empty, or has another shape; the message names it.
    """
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, "pt") as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    missing = [f"{key} is missing" for key in expected if key not in found]
    wrong = [
        f"{key} is {found[key]} in place of {shape}"
        for key, shape in expected.items()
        if found.get(key, shape) != shape
    ]
    if problems := missing + wrong:
        raise ValueError(
            f"the adapter saved in {folder} is not complete: {len(problems)} of {len(expected)} tensors are missing "
            f"or wrong, {problems[0]}. Its shards were not gathered: do not use it."
        )
    return len(found)


def gather_adapter(trainer: Trainer) -> dict[str, Any] | None:
    """The trained tensors, whole, on the main process, where they are sharded; None where each process has them.

    All processes must call it.
    """
    if trainer.is_deepspeed_enabled:
        engine: Any = trainer.model_wrapped
        if engine.zero_optimization_stage() < 3:
            return None
        return engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    if not trainer.is_fsdp_enabled:
        return None
    if not trainer.accelerator.is_fsdp2:
        whole: Any = trainer.accelerator.get_state_dict(trainer.model)
        return whole
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    # the frozen weights stay where they are: whole, they may not fit into any one memory
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(adapted_model(trainer.model), options=options)


def write_adapter(trainer: Trainer, state: dict[str, Any] | None, folder: Path, expected: Shapes) -> int:
    """The number of tensors in the adapter, which is read back; for the main process, with what it has gathered."""
    model = adapted_model(trainer.accelerator.unwrap_model(trainer.model))
    model.save_pretrained(str(folder), state_dict=state)
    return verify_adapter(folder, expected)


def adapted_model(model: Any) -> PeftModel:
    """The trainer's model, or what is adapted in it: a SentenceTransformer has its transformer inside."""
    return next(module for module in model.modules() if isinstance(module, PeftModel))


class CheckpointMarks(TrainerCallback):
    """Verifies each checkpoint that the Trainer has written, marks it, and only then removes older ones."""

    def __init__(self, trainer: Trainer, folder: RunFolder, recipe: Recipe, expected: Shapes) -> None:
        self.start: dict[str, Any] = {}
        self.epoch_rng = ""
        self._resumed = False
        self._saved_step: int | None = None
        self._trainer = trainer
        self._folder = folder
        self._recipe = recipe.model_dump(mode="json")
        self._expected = expected
        # the Trainer would remove the last complete one before the next is known to be complete
        self._limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None
        self._save = trainer._save_checkpoint
        trainer._save_checkpoint = self._save_or_explain

    def _save_or_explain(self, *args: Any, **kwargs: Any) -> None:
        step = self._trainer.state.global_step
        if step == self._saved_step:
            # the Trainer may save at the end of a step and again at the end of its epoch
            return
        path = self._folder.checkpoints / f"checkpoint-{step}"
        if is_main():
            (path / CHECKPOINT_MARK).unlink(missing_ok=True)
        with explained(path, self._folder):
            try:
                self._save(*args, **kwargs)
            except BaseException:
                if is_main():
                    shutil.rmtree(path, ignore_errors=True)
                raise

    def resume(self, checkpoint: Checkpoint) -> None:
        self.start, self.epoch_rng, self._resumed = checkpoint.start, checkpoint.epoch_rng, True

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # the Trainer restores the generator after it has drawn the order of an epoch that it resumes; and processes
        # whose generators have parted would draw different orders
        if not self._resumed:
            self.epoch_rng = decided_by_main(lambda: b64encode(bytes(torch.get_rng_state().tolist())).decode())
        self._resumed = False
        torch.set_rng_state(torch.tensor(list(b64decode(self.epoch_rng)), dtype=torch.uint8))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self._saved_step:
            return
        path = self._folder.checkpoints / f"checkpoint-{state.global_step}"
        with explained(path, self._folder):
            # each process has written its own part by now
            wait_for_all()
            # the Trainer writes none where each process saves its shards
            state_dict = gather_adapter(self._trainer) if self._trainer.is_fsdp_enabled else None
            if is_main():
                if state_dict is None:
                    num_keys = verify_adapter(path, self._expected)
                else:
                    num_keys = write_adapter(self._trainer, state_dict, path, self._expected)
                Checkpoint(
                    path,
                    step=state.global_step,
                    num_keys=num_keys,
                    files=sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()),
                    devices=devices(self._trainer),
                    recipe=self._recipe,
                    start=self.start,
                    epoch_rng=self.epoch_rng,
                ).write()
        if is_main():
            rotate_checkpoints(
                output_dir=str(self._folder.checkpoints),
                save_total_limit=self._limit,
                best_model_checkpoint=state.best_model_checkpoint,
                use_mtime=False,
            )
        wait_for_all()
        self._saved_step = state.global_step


def devices(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint's files depend on."""
    return {"processes": num_processes(), "distributed_type": trainer.accelerator.distributed_type.value}


@contextmanager
def explained(path: Path, folder: RunFolder) -> Iterator[None]:
    """What fails to be written in the block is said, with what is left and how to go on.

    Raises:
        OSError: the disk is full, or the like.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (OSError, SafetensorError, CheckpointException, RuntimeError) as error:
        # what torch.save raises has no type of its own
        places = {Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)}
        if type(error) is RuntimeError and Path(torch.serialization.__file__) not in places:
            raise
        # the others have no number
        is_full = getattr(error, "errno", None) in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "make room" if is_full else "mend that"
        try:
            checkpoint, _ = last_complete(folder)
        except ValueError:
            checkpoint = None
        left = (
            f"The last complete checkpoint, {checkpoint.path}, is intact: {remedy}, then run the same command with "
            "--resume."
            if checkpoint
            else f"There is no earlier checkpoint: {remedy}, then run the same command with --overwrite."
        )
        if isinstance(error, CheckpointException):
            # its text has the tracebacks of all
            reason = "; ".join(f"process {rank}: {failure}" for rank, (failure, _) in error.failures.items())
        else:
            reason = str(error)
        raise OSError(f"{path} could not be written: {reason}. {left}") from error
