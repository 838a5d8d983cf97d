"""Tasks of the lm-eval library, measured on a model in memory."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from .tasks.batches import without_autocast


class Harness:
    """The tasks are looked up at construction, before any model is loaded.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: there is no such task.
    """

    def __init__(self, tasks: Sequence[str], include: str | None) -> None:
        try:
            from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                "--lm-eval needs the lm-eval library: install dlor-peft with its extra 'eval'"
            ) from error

        self.manager = TaskManager(include_path=include)
        self.tasks = list(tasks)
        for task in self.tasks:
            if not self.manager.match_tasks([task]):
                close = difflib.get_close_matches(task, self.manager.all_tasks, n=1)
                guess = f" Did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"--lm-eval: no task {task!r}.{guess} `lm-eval ls tasks` lists them.")

    def measure(self, model: Any, tokenizer: Any, batch_size: int) -> dict[str, float]:
        """The tasks' metrics; the key is "task metric"."""
        import lm_eval.evaluator  # pyright: ignore[reportMissingImports]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

        # both are behind decorators that hide what they take
        wrap: Any = HFLM
        evaluate: Any = lm_eval.evaluator.simple_evaluate
        wrapped = wrap(pretrained=without_autocast(model).eval(), tokenizer=tokenizer, batch_size=batch_size)
        results = evaluate(model=wrapped, tasks=self.tasks, task_manager=self.manager, log_samples=False)
        return {
            f"{task} {metric.removesuffix(',none')}": float(value)
            for task, metrics in results["results"].items()
            for metric, value in metrics.items()
            if isinstance(value, (int, float)) and metric not in ("alias", "sample_len")
        }
