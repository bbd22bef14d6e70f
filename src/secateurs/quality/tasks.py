"""Tasks beside perplexity: lm-eval's, or task files of your own. Two models are compared question by question."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from secateurs.base.errors import CalibrationError
from secateurs.base.estimate import score_of
from secateurs.base.precision import widened
from secateurs.base.progress import no_bars
from secateurs.base.seed import own_numbers
from secateurs.model.source import trusted

# the metric that stands for a task: the first of these that it has
_PREFERRED = ("acc", "exact_match", "acc_norm", "f1")


def check(tasks: Sequence[str], tasks_path: str | None) -> Any:
    """lm-eval's task manager. Raises CalibrationError without lm-eval, and for unknown tasks and groups of tasks."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise CalibrationError("tasks need the library lm-eval; pip install 'secateurs[tasks]'") from None
    manager = TaskManager(include_path=tasks_path, include_defaults=tasks_path is None)
    for name in tasks:
        if name in (*manager.all_groups, *manager.all_tags):
            raise CalibrationError(
                f"'{name}' is a group of lm-eval tasks, which has no questions of its own; name its tasks"
            )
        if name not in manager.all_tasks:
            where = tasks_path or "lm-eval"
            known = ", ".join(sorted(manager.all_subtasks)[:12])
            raise CalibrationError(f"no task '{name}' in {where}; it has {known}")
    return manager


def run_tasks(folder: Path, tasks: Sequence[str], tasks_path: str | None, limit: int | None = None) -> dict[str, Any]:
    """lm-eval tasks on a model folder: {task: {metric: value, metric_stderr: value}}. Loads the whole model.

    Each task also has 'metric', the name of its main metric, and 'scores', that metric for every question. tasks_path: a folder
    of YAML task files (and the JSONL they name). limit: questions of each task. Raises CalibrationError without lm-eval, or for a
    task that it does not know.
    """
    manager = check(tasks, tasks_path)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with no_bars():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=trusted())
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted())
    # by itself it would take a GPU where there is one, and report.json would name the wrong device
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, device="cpu")
    # lm-eval seeds Python, NumPy and torch
    with widened(), own_numbers():
        found = simple_evaluate(
            model=lm, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=1000, log_samples=True
        )
    out: dict[str, Any] = {}
    for task, row in found["results"].items():
        out[task] = {k.removesuffix(",none"): v for k, v in row.items() if isinstance(v, (int, float))}
        samples = found["samples"].get(task, [])
        metric = next((m for m in _PREFERRED if samples and m in samples[0]), None)
        if metric is not None:
            # a task may read its answers in several ways (filters); the first one counts
            ways = [s for s in samples if s.get("filter") == samples[0].get("filter")]
            out[task] |= {"metric": metric, "scores": [float(s[metric]) for s in sorted(ways, key=_number)]}
    return out


def _number(sample: dict[str, Any]) -> int:
    return int(sample["doc_id"])


def compare(dense: dict[str, Any], pruned: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """{task: metric, and estimates dense, pruned and difference (pruned - dense, paired)} of two results of run_tasks()."""
    out = {}
    for task, row in dense.items():
        if "scores" not in row or "scores" not in pruned.get(task, {}):
            continue
        a, b = np.array(row["scores"]), np.array(pruned[task]["scores"])
        # some tasks count in percent
        top = max(1.0, *a, *b)
        out[task] = {
            "metric": row["metric"],
            "dense": vars(score_of(a, 0.0, top, seed)),
            "pruned": vars(score_of(b, 0.0, top, seed)),
            "difference": vars(score_of(b - a, -top, top, seed)),
        }
    return out


def without_scores(results: dict[str, Any]) -> dict[str, Any]:
    """The results of run_tasks() as reports show them: without the scores of single questions."""
    return {task: {k: v for k, v in row.items() if k not in ("metric", "scores")} for task, row in results.items()}
