"""Plans in one line: the settings of calibration and evaluation by the names of their flags."""

import dataclasses

from secateurs.decide.plan import DecidePlan
from secateurs.quality.settings import FLAGS, Calibration, Evaluation
from secateurs.train.recover_plan import RecoverPlan

_CALIBRATION, _EVALUATION = (
    {flag.replace("-", "_"): name for name, flag in FLAGS[part].items()} for part in ("calibration", "evaluation")
)


def asked(kind, *positional, **options):
    """A plan of this class."""
    if kind is DecidePlan and len(positional) > 1:
        model, gate, *positional = positional
        positional, options = [model, Evaluation(), *positional][:1], {"gate": gate, **_named(positional), **options}
    base = {
        "calibration": Calibration(samples=None) if kind is RecoverPlan else Calibration(),
        "evaluation": Evaluation(),
    }
    return kind(*positional, **_nested(base, options))


def changed(plan, **options):
    """The plan with other options."""
    base = {"calibration": plan.calibration, "evaluation": plan.evaluation}
    return dataclasses.replace(plan, **_nested(base, options))


def _named(positional):
    return dict(zip(("candidates",), positional, strict=False))


def _nested(base, options):
    rest = {k: v for k, v in options.items() if k not in _CALIBRATION and k not in _EVALUATION}
    for name, flags in (("calibration", _CALIBRATION), ("evaluation", _EVALUATION)):
        rest[name] = dataclasses.replace(base[name], **{flags[k]: v for k, v in options.items() if k in flags})
    return rest
