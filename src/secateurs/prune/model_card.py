"""The model card of a pruned folder: README.md with what a reader on a hub needs to know."""

from secateurs.prune.record import Report


def model_card(report: Report) -> str:
    """Markdown with front matter. Everything in it is in report.json, too."""
    plan, totals = report.plan, report.totals
    lines = [
        "---",
        "library_name: transformers",
        "tags: [pruning, sparsity, secateurs]",
        f"base_model: {plan['model']}"
        if "/" in plan["model"] and not plan["model"].startswith(("/", ".", "~"))
        else "",
        "---",
        "",
        "# A pruned model",
        "",
        f"Made by secateurs {report.machine['versions']['secateurs']} from a dense model, by one-shot pruning.",
        "",
        "| | |",
        "|---|---|",
        f"| pattern | {plan['pattern']} |",
        f"| method | {plan['method']}, scope {plan['scope']} |",
        f"| zeros in pruned layers | {totals['sparsity']:.2%} of {totals['weights']:,} weights |",
        f"| layers pruned, left dense | {totals['layers_pruned']}, "
        f"{sum(totals[f'layers_skipped_by_{by}'] for by in ('plan', 'shape', 'kind'))} |",
    ]
    if report.reconstruction or report.distillation:
        lines.append(
            f"| survivors tuned on calibration text | {plan['reconstruct']} steps a block against the dense block, "
            f"{plan['distill']} of the whole against the dense model's predictions |"
        )
    if report.calibration:
        lines.append(f"| calibration | {report.calibration['source']}, {report.calibration['tokens']:,} tokens |")
    if report.quality and report.evaluation:
        q = report.quality
        lines += [
            f"| evaluation text | {report.evaluation['source']}, {q['windows']} windows of "
            f"{report.evaluation['seqlen']} tokens |",
            f"| perplexity, dense | {_interval(q['ppl_dense'])} |",
            f"| perplexity, pruned | {_interval(q['ppl'])} |",
            f"| KL to dense, nats a token | {_interval(q['kl'])} |",
            f"| same top token as dense | {_interval(q['agree'])} |",
        ]
    lines += [
        "",
        "The zeros are stored as zeros: this folder is as large as the dense one and a dense kernel runs it no faster. "
        "`secateurs pack` stores it without them.",
        "It loads with `AutoModelForCausalLM.from_pretrained` and needs no code of secateurs.",
        "",
    ]
    return "\n".join(line for line in lines if line is not None)


def _interval(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.4g} [{estimate['low']:.4g}, {estimate['high']:.4g}]"
