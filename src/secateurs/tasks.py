"""Tasks beside perplexity: lm-eval's, or files of one's own; dense and pruned compared question by question."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from secateurs.errors import CalibrationError
from secateurs.estimate import mean_of

# a task's own metric is the first of these that it has
_PREFERRED = ("acc", "exact_match", "acc_norm", "f1")


def run_tasks(folder: Path, tasks: Sequence[str], tasks_path: str | None, limit: int | None = None) -> dict[str, Any]:
    """lm-eval tasks on a model folder: {task: {metric: value, metric_stderr: value}}. Loads the whole model.

    Each task also has 'metric', its own one, and 'scores', that metric of every question. tasks_path: a folder of YAML task
    files (and the JSONL they name). limit: questions of each task. Raises CalibrationError without lm-eval, or for a task that
    it does not know.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise CalibrationError("tasks need the library lm-eval; pip install 'secateurs[tasks]'") from None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    manager = TaskManager(include_path=tasks_path, include_defaults=tasks_path is None)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        where = tasks_path or "lm-eval"
        raise CalibrationError(f"no task '{unknown[0]}' in {where}; it has {', '.join(sorted(manager.all_tasks)[:12])}")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    found = simple_evaluate(
        model=lm, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=1000, log_samples=True
    )
    out: dict[str, Any] = {}
    for task, row in found["results"].items():
        out[task] = {k.removesuffix(",none"): v for k, v in row.items() if isinstance(v, (int, float))}
        samples = found["samples"].get(task, [])
        metric = next((m for m in _PREFERRED if samples and m in samples[0]), None)
        if metric is not None:
            # a task may read its answers in several ways; the first counts
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
        estimates = {"dense": a, "pruned": b, "difference": b - a}
        out[task] = {
            "metric": row["metric"],
            **{name: vars(mean_of(values, seed)) for name, values in estimates.items()},
        }
    return out


def without_scores(results: dict[str, Any]) -> dict[str, Any]:
    """What a report shows of run_tasks(): numbers only."""
    return {task: {k: v for k, v in row.items() if k not in ("metric", "scores")} for task, row in results.items()}
