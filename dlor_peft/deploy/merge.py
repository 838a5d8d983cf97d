"""Adapters merged into a saved model, file by file: the model is never in memory.

Every weight goes through `blocks.write_adapted`, as in `merge_and_unload`: the results are the same to the bit.
"""

from __future__ import annotations

import importlib.metadata
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from .. import __version__
from ..blocks import Block, round_to_nearest
from .adapter import SavedAdapter
from .checkpoint import Checkpoint
from .conversion import Unit, units
from .rounding import ROUNDINGS, Survival, round_stochastically
from .skeleton import Change, Skeleton
from .surroundings import RECORD, write_surroundings
from .writing import Shards, new_folder, write_json

MIN_SURVIVED = 0.9
"""Below this share of an update that is left after rounding, a merge warns."""

_SIZE = re.compile(r"0*[1-9]\d*(\s*[KMGT]B)?", re.IGNORECASE)
_FLOATING = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class MergeOptions:
    """How the merged model is written.

    dtype       of all floating tensors; that of each tensor in the base where None
    rounding    "nearest", or "stochastic", which keeps on average what is smaller than half a step
    seed        of stochastic rounding
    shard_size  of a file at most: bytes, or such as "5GB"
    untie       store what an adapter makes different of weights that were one
    overwrite   replace a folder that is there
    """

    dtype: torch.dtype | None = None
    rounding: str = "nearest"
    seed: int = 0
    shard_size: int | str = "5GB"
    untie: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"{__name__}: rounding={self.rounding!r} is none of {', '.join(ROUNDINGS)}.")
        if not _SIZE.fullmatch(str(self.shard_size)):
            raise ValueError(
                f"{__name__}: shard_size={self.shard_size!r} is no size of a file: give bytes, or such as 5GB."
            )
        if self.dtype not in (None, *_FLOATING):
            raise ValueError(f"{__name__}: dtype={self.dtype} is none of {', '.join(map(str, _FLOATING))}.")


@dataclass
class Job:
    """Tensors that are written together: the units they come from, and what becomes of each of their targets."""

    unit: Unit | None
    changes: Mapping[str, Change]  # name in the model -> change
    outputs: dict[str, Tensor]  # name in the file -> shape and dtype
    # where the base has no such tensor: a head, or one that was tied
    only: str | None = None


class Merge:
    """What a merge will write, worked out from the names and shapes alone; then `write` writes it."""

    def __init__(
        self, base: Checkpoint, adapters: Sequence[SavedAdapter], options: MergeOptions | None = None
    ) -> None:
        """Plan it.

        Args:
            base: the model to merge into.
            adapters: in the order of merging, each into the weight that those before it made.
            options: see there.

        Raises:
            ValueError: an adapter does not fit the base; the base lacks a tensor; tied weights would become different.
        """
        if not adapters:
            raise ValueError(f"{__name__}: there is no adapter to merge.")
        self.base, self.adapters, self.options = base, adapters, options or MergeOptions()
        self.skeleton = Skeleton(base, adapters)
        self.survival: dict[str, Survival] = {}
        self._units, self.dropped = units(base.specs, self.base.read_empty, self.skeleton.model)
        self._unit_of = {target: unit for unit in self._units for target in unit.targets}
        self.untied = self._resolve_ties()
        self._check_complete()
        self.jobs = [*self._planned_units(), *self._planned_additions()]

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """The class that the merged model is of."""
        return type(self.skeleton.model)

    @property
    def class_name(self) -> str:
        return self.model_class.__name__

    def write(self, out: str | Path) -> dict[str, Any]:
        """Write the model to the folder `out`, and return what `dlor_merge.json` in it records.

        Raises:
            FileExistsError: the folder is there.
            OSError: it cannot be written; nothing is left of it.
            ValueError: a merged weight is not finite.
        """
        self.survival.clear()
        tensors = {name: tensor for job in self.jobs for name, tensor in job.outputs.items()}
        inputs = [self.base.folder.path, *(adapter.folder for adapter in self.adapters)]
        with new_folder(out, self.options.overwrite, inputs) as folder:
            total = sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())
            with (
                _threads() as self._each,
                Shards(folder, tensors, _in_bytes(self.options.shard_size)) as shards,
                ThreadPoolExecutor(1) as writer,
                tqdm(total=total, unit="B", unit_scale=True, desc="merging") as progress,
            ):
                # one tensor is written while the next one is adapted
                written = writer.submit(int)
                for name, tensor in (output for job in self.jobs for output in self._run(job)):
                    written.result()
                    written = writer.submit(shards.write, name, tensor)
                    progress.update(tensor.numel() * tensor.dtype.itemsize)
                written.result()
            self.base.close()
            write_surroundings(
                folder, self.base, self.adapters, self.skeleton.model, self.options.dtype, is_untied=bool(self.untied)
            )
            record = self.record()
            write_json(folder / RECORD, record)
        self._warn_of_losses()
        return record

    def record(self) -> dict[str, Any]:
        """What was merged into what, and what became of each update."""
        packages = ("torch", "transformers", "peft", "safetensors")
        return {
            "base": {"source": self.base.folder.source, "revision": self.base.folder.revision},
            "adapters": [
                {"source": adapter.source, "revision": adapter.revision, "sha256": adapter.sha256}
                for adapter in self.adapters
            ],
            "class": self.class_name,
            "dtype": None if self.options.dtype is None else str(self.options.dtype).removeprefix("torch."),
            "rounding": self.options.rounding,
            "seed": self.options.seed if self.options.rounding == "stochastic" else None,
            "layers": {
                name: {
                    "update_ratio": found.update_ratio,
                    "survived": found.survived,
                    "rounding_error": found.rounding_error,
                }
                for name, found in self.survival.items()
            },
            "dropped": self.dropped,
            "untied": self.untied,
            "versions": {"dlor-peft": __version__, **{name: importlib.metadata.version(name) for name in packages}},
        }

    def _finish(self, block: Block) -> Survival:
        if self.options.rounding == "stochastic":
            round_stochastically(block, self.options.seed)
        else:
            round_to_nearest(block)
        return Survival.of_block(block)

    def _dtype(self, tensor: Tensor) -> torch.dtype:
        return self.options.dtype if self.options.dtype is not None and tensor.is_floating_point() else tensor.dtype

    def _resolve_ties(self) -> list[str]:
        """Names in the model of what is to be stored besides, since it is tied no more."""
        changes, untied = self.skeleton.changes, []
        for names in self.skeleton.ties:
            of_names = [changes.get(name, Change()) for name in names]
            changed = [name for name in names if name in changes]
            if not changed:
                continue
            if all(change.is_same(of_names[0]) for change in of_names[1:]):
                changes.update(dict.fromkeys(names, changes[changed[0]]))
                continue
            if not self.options.untie:
                others = [name for name in names if name not in changed] or names
                raise ValueError(
                    f"{' and '.join(names)} are one tensor in {self.base.folder.source}, and the adapter changes "
                    f"{' and '.join(changed)} in another way than {' and '.join(others)}. Pass --untie to store each "
                    "by itself, or train with ensure_weight_tying=True."
                )
            untied += names
        return untied

    def _check_complete(self) -> None:
        """ValueError where a parameter of the model is neither in the base nor in an adapter."""
        there = {*self._unit_of, *(name for name, c in self.skeleton.changes.items() if c.replacement is not None)}
        tied = [names for names in self.skeleton.ties if there & set(names)]
        there |= {name for names in tied for name in names}
        missing = [name for name in self.skeleton.parameters if name not in there]
        if missing:
            raise ValueError(
                f"{self.base.folder.source} does not match: the adapter was trained on a "
                f"{self.class_name}, and neither the base nor the adapter has its {missing[0]} "
                f"{tuple(self.skeleton.parameters[missing[0]].shape)}"
                f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}."
            )

    def _planned_units(self) -> Iterator[Job]:
        model = self.skeleton.model
        in_model = model.state_dict()
        for unit in self._units:
            changes = {name: self.skeleton.changes[name] for name in unit.targets if name in self.skeleton.changes}
            empty = unit.to_model(self.base.read_empty, model)
            for name, tensor in empty.items():
                if tensor.shape != in_model[name].shape and not (
                    name in changes and changes[name].replacement is not None
                ):
                    raise ValueError(
                        f"{self.base.folder.source} does not match its own configuration: {unit.sources[0]} has the "
                        f"shape {tuple(tensor.shape)}, and {type(model).__name__} needs {tuple(in_model[name].shape)}."
                    )
                if name in changes and changes[name].layer is not None and tensor.dtype not in _FLOATING:
                    raise ValueError(
                        f"{self.base.folder.source}: {unit.sources[0]} is stored as {tensor.dtype}, which cannot be "
                        f"adapted. Name the unquantised original as the base; {', '.join(map(str, _FLOATING))} work."
                    )
            if changes:
                adapted = {name: self._planned(tensor, changes.get(name)) for name, tensor in empty.items()}
                outputs = unit.to_checkpoint(adapted, model)
            elif unit.converter is None:
                outputs = unit.to_checkpoint(empty, model)
            else:
                outputs = {key: self.base.read_empty(key) for key in unit.sources}
            yield Job(unit, changes, {name: self._cast(tensor) for name, tensor in outputs.items()})

    def _planned_additions(self) -> Iterator[Job]:
        """Heads that the base has not, and what was tied to another tensor."""
        model = self.skeleton.model
        additions = [name for name, c in self.skeleton.changes.items() if c.replacement is not None]
        for name in dict.fromkeys([*self.untied, *additions]):
            if name in self._unit_of:
                continue
            change = self.skeleton.changes.get(name, Change())
            partners = [names for names in self.skeleton.ties if name in names]
            if partners and name not in self.untied:
                # still tied to a tensor that is written
                continue
            source = None
            if change.replacement is None:
                source = next(self._unit_of[other] for other in partners[0] if other in self._unit_of)
            if source is None:
                assert change.replacement is not None
                planned = change.replacement.to("meta", self._base_dtype)
            else:
                planned = self._planned(source.to_model(self.base.read_empty, model)[source.targets[0]], change)
            (key,) = Unit(name=name, targets=[name]).to_checkpoint({name: planned}, model)
            yield Job(source, {name: change}, {key: self._cast(planned)}, only=name)

    @cached_property
    def _base_dtype(self) -> torch.dtype:
        """Of most of the base: a head that was trained in float32 joins it."""
        sizes: dict[torch.dtype, int] = {}
        for spec in self.base.specs.values():
            if spec.dtype in _FLOATING:
                sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.num_bytes
        return max(sizes, key=sizes.__getitem__, default=torch.float32)

    def _planned(self, tensor: Tensor, change: Change | None) -> Tensor:
        if change is not None and change.replacement is not None:
            return tensor.new_empty(change.replacement.shape)
        return tensor

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype(tensor))

    def _run(self, job: Job) -> Iterator[tuple[str, Tensor]]:
        model, unit = self.skeleton.model, job.unit
        if job.only is not None:
            (key, planned), change = *job.outputs.items(), job.changes[job.only]
            stored = None if unit is None else unit.to_model(self.base.read, model)[unit.targets[0]]
            yield key, self._changed(job.only, stored, change, planned.dtype)
            return
        assert unit is not None
        if not job.changes:
            for key, source in zip(job.outputs, unit.sources, strict=True):
                yield key, self._cast(self.base.read(source))
            return
        tensors = unit.to_model(self.base.read, model)
        for name in list(tensors):
            stored = tensors.pop(name)
            change = job.changes.get(name)
            tensors[name] = (
                self._cast(stored) if change is None else self._changed(name, stored, change, self._dtype(stored))
            )
        yield from unit.to_checkpoint(tensors, model).items()

    def _changed(self, name: str, stored: Tensor | None, change: Change, dtype: torch.dtype) -> Tensor:
        W = stored if change.replacement is None else change.replacement
        assert W is not None
        if change.replacement is not None and stored is not None and change.layer is not None:
            # an embedding that is saved along with its adapter, which the merge reads as it reads the base
            W = W.to(stored.dtype)
        if change.layer is not None:
            merged = torch.empty(W.shape, dtype=dtype)
            of_blocks = change.layer.write_merged(W, merged, change.adapters, finish=self._finish, each=self._each)
            survival = self.survival[name] = sum(of_blocks, Survival())
            if not survival.is_finite:
                raise ValueError(
                    f"the merged {name} is not finite in {dtype}. The adapter is broken, or the weight leaves the "
                    "range: merge to float32 or bfloat16 (--dtype)."
                )
            W = merged
        for indices, rows in change.tokens:
            W = W.index_copy(0, torch.tensor(indices), rows.to(W.dtype))
        return W.to(dtype)

    def _warn_of_losses(self) -> None:
        lost = {name: found.survived for name, found in self.survival.items() if found.survived < MIN_SURVIVED}
        if lost:
            worst = min(lost, key=lost.__getitem__)
            warnings.warn(
                f"{__name__}: rounding dropped more than {1 - MIN_SURVIVED:.0%} of the update of {len(lost)} of "
                f"{len(self.survival)} weights, the most of {worst}, of which {lost[worst]:.0%} is left. Merge to "
                "float32 (--dtype float32), or with --rounding stochastic.",
                stacklevel=3,
            )


def _in_bytes(size: int | str) -> int | str:
    """A number of bytes as one; what has a unit as it is."""
    return int(size) if str(size).isdecimal() else size


@contextmanager
def _threads() -> Iterator[Callable]:
    """A `map` by as many threads as torch would take for one operation. A block is too small for several."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(num_threads)
