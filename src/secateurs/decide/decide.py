"""Recommends what to ship on this machine: candidates are estimated, pruned, held to the quality floor and timed.

The run directory holds plan.json, profile.json, candidates/NAME (each a run directory of prune or shrink, with its packed model and
timing.json) and decide.json. After a kill, what was measured is read and not measured again.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from secateurs.base.device import machine
from secateurs.base.errors import DeviceError, PlanError, SecateursError
from secateurs.base.files import write_json
from secateurs.base.precision import described
from secateurs.base.progress import Progress, silent
from secateurs.base.run_directory import claim, locked, resolved, unchanged
from secateurs.decide.plan import DecidePlan
from secateurs.decide.realize import GAIN, Candidate, Worth, machine_named, realize
from secateurs.kernels.formats import DTYPES
from secateurs.kernels.packed_linear import linears
from secateurs.machine.bench import bench, variants_of
from secateurs.machine.hardware import Hardware
from secateurs.machine.probe import Question, probe, shapes_of
from secateurs.machine.profile import DeviceProfile
from secateurs.machine.timing import Timing
from secateurs.model import checkpoint
from secateurs.model.blocks import prefixes_of
from secateurs.pack.folder import pack_run
from secateurs.prune.run import Run
from secateurs.quality import evaluation
from secateurs.shrink.budget import Budget
from secateurs.shrink.cuts import cuts_of
from secateurs.shrink.plan import ShrinkPlan
from secateurs.shrink.run import shrink

Show = Callable[[list[dict[str, Any]]], None]

FORMAT = 1
# of so many runs the slowest is above the median in 1 - 2^-5 of measurements; of ten the second slowest is more often
_RUNS = 5
# a second prompt is so many times as long
_LONGER = 4


def decide(
    plan: DecidePlan, out: str | Path, progress: Progress = silent, show: Show = lambda rows: None
) -> dict[str, Any]:
    """Begin or go on with a decision, and return decide.json. show: called with all rows whenever one changes.

    Where no candidate pays, the result's `recommended` is 'dense'. Raises SecateursError.
    """
    return _Decision(plan, Path(out).expanduser(), progress, show).complete()


class _Decision:
    def __init__(self, plan: DecidePlan, out: Path, progress: Progress, show: Show) -> None:
        self.plan = dataclasses.replace(plan, model=resolved(plan.model))
        self.out, self.progress, self.show = out, progress, show
        self.errors: list[SecateursError] = []

    def complete(self) -> dict[str, Any]:
        source = checkpoint.Checkpoint(self.plan.model)
        if not evaluation.predicts_next_token(source):
            raise PlanError(
                f"{self.plan.model} is no causal language model, and a decision compares seconds of a prompt and of new "
                "tokens; prune it, and compare by `secateurs eval`"
            )
        skeleton = source.skeleton()
        _fits(skeleton.config, self.plan)
        self.dtype = DTYPES.get(skeleton.config.dtype, "fp32")
        self.share = _share(skeleton)
        self.units = _units(skeleton)
        evaluation.check(self.plan.evaluation)
        given = self._given_profile()
        claim(self.out, self.plan.as_dict())
        with locked(self.out):
            # finished candidates were made from this model
            unchanged(self.out, {self.plan.model: source.fingerprint()})
            self.here = given if given is not None else self._own_profile()
            self.estimated = not (isinstance(self.here, DeviceProfile) and self.here.of_here)
            self.rows: list[dict[str, Any]] = [self._estimate(c) for c in self.plan.parsed]
            self.show(self.rows)
            # the mildest of a kind first: if it misses the floor, those that remove more are not tried
            order = sorted(range(len(self.rows)), key=lambda i: -self.plan.parsed[i].kept)
            for i in order:
                self._settle(i)
                self.show(self.rows)
            if self.errors and not any(r["status"] == "measured" for r in self.rows):
                # every candidate failed by error, so there is nothing to decide on
                raise self.errors[0]
            result = self._result()
            write_json(self.out / "decide.json", result)
        return result

    # ------------------------------------------------------------------------------------------------- estimates

    def _given_profile(self) -> DeviceProfile | Hardware | None:
        plan = self.plan
        if plan.profile is None:
            return None
        found = machine_named(plan.profile)
        if isinstance(found, DeviceProfile) and not (found.of_here or plan.foreign):
            here = machine()
            raise DeviceError(
                f"{plan.profile} is of {found.name}, this machine is {here['processor']}, {here['threads']} threads, and times do "
                "not carry over; run `secateurs probe` here, or pass --allow-foreign-profile to decide by its estimates"
            )
        return found

    def _own_profile(self) -> DeviceProfile:
        """This machine's profile: the run's own, the one that `secateurs probe` left, or one measured now on the model's shapes."""
        file = self.out / "profile.json"
        if file.is_file():
            profile = DeviceProfile.read(file)
            if not profile.of_here:
                raise DeviceError(
                    f"{self.out} was begun on {profile.name}, this is another machine or number of threads, and times do not carry "
                    "over; go on there, or choose another folder"
                )
            return profile
        at_hand = DeviceProfile.at_hand()
        if at_hand is None or not any(r["dtype"] == self.dtype for r in at_hand.rows):
            masks = [c for c in self.plan.parsed if c.kind == "mask"]
            sparsities = tuple(sorted({c.sparsity for c in masks} or {0.5}))
            question = Question(
                shapes_of(self.plan.model, 2), sparsities, ("unstructured",), tokens=(1, 256), dtypes=(self.dtype,),
                seconds_per_cell=1.0,
            )  # fmt: skip
            at_hand = probe(question, self.progress)
        at_hand.write(file)
        return at_hand

    def _estimate(self, candidate: Candidate) -> dict[str, Any]:
        worth = realize(candidate, self.here, self.dtype)
        timed = candidate.kind == "shrink" and Budget.parse(candidate.budget).timed
        nbytes, seconds = self._of_all(worth.nbytes, candidate), self._estimated_seconds(worth, candidate)
        row: dict[str, Any] = {
            "candidate": candidate.text, "status": "estimated", "reason": None, "worth": dataclasses.asdict(worth), "quality": None,
            "gate": [], "passed": None, "bytes_ratio": nbytes, "seconds_ratio": seconds, "prefill": 1 / worth.prefill,
            "decode": 1 / worth.decode, "measured": False, "folder": None, "warnings": [],
        }  # fmt: skip
        if not worth.pays:
            row |= {"status": "dropped", "reason": f"would not pay: {worth.why}"}
        elif self.estimated and timed:
            why = "its budget is a time, which can only be measured on the machine itself; give params, bytes or flops"
            row |= {"status": "dropped", "reason": why}
        elif not candidate.budget.startswith("seconds") and (reason := self._over_budget(row, slack=GAIN)):
            row |= {"status": "dropped", "reason": f"by estimate, {reason}"}
        return row

    def _of_all(self, fraction: float, candidate: Candidate) -> float:
        """A fraction of the pruned layers as a fraction of the whole model, whose embeddings and head stay as they are."""
        return fraction if candidate.kind == "shrink" else 1 - (1 - fraction) * self.share

    def _estimated_seconds(self, worth: Worth, candidate: Candidate) -> dict[str, float]:
        """Seconds of a request over the dense model's, as if prompts were bound by arithmetic and tokens by memory bandwidth."""
        flops = self.here.flops_per_second
        rate = flops.get(self.dtype, max(flops.values())) if isinstance(flops, dict) else flops
        itemsize = 4 if self.dtype == "fp32" else 2
        prefill = 2 * self.plan.prompt / rate
        decode = itemsize * self.plan.new / self.here.bytes_per_second
        ratio = self._of_all((worth.prefill * prefill + worth.decode * decode) / (prefill + decode), candidate)
        return {"value": ratio, "low": ratio, "high": ratio}

    # ------------------------------------------------------------------------------------------------ measurements

    def _settle(self, i: int) -> None:
        row, candidate = self.rows[i], self.plan.parsed[i]
        if row["status"] == "dropped":
            return
        for other, settled in zip(self.plan.parsed, self.rows, strict=True):
            milder = other.family == candidate.family and other.kept > candidate.kept
            missed = [g["missed"] for g in settled["gate"] if g["verdict"] == "missed"]
            if milder and missed:
                row |= {"status": "dropped", "reason": f"{other.text} removes less and already fails: {missed[0]}"}
                return
        row["status"] = "running"
        self.show(self.rows)
        try:
            self._measure(row, candidate)
        except SecateursError as error:
            # the other candidates are still measured
            row |= {"status": "failed", "reason": str(error)}
            self.errors.append(error)

    def _measure(self, row: dict[str, Any], candidate: Candidate) -> None:
        folder = self.out / "candidates" / re.sub(r"[^\w.=]+", "-", candidate.text)
        asked = self.plan.plan_of(candidate)
        if isinstance(asked, ShrinkPlan) and not candidate.units:
            asked = dataclasses.replace(asked, units=self.units)
        label = candidate.text

        def progress(what: str, done: int, total: int) -> None:
            self.progress(f"{label}: {what}", done, total)

        if isinstance(asked, ShrinkPlan):
            report = shrink(asked, folder, progress, self.out / "work")
            nbytes = report["bytes"]
        else:
            Run(asked, folder, progress, self.out / "work").complete()
            report = json.loads((folder / "report.json").read_text())
            if report["packed"] is None:
                profile = self.here if isinstance(self.here, DeviceProfile) and not self.estimated else None
                pack_run(folder, None, profile, progress)
                report = json.loads((folder / "report.json").read_text())
            nbytes = report["bytes"]
        row |= {
            "quality": report["quality"], "gate": report["gate"], "compared": report.get("compared", {}),
            "passed": all(g["passed"] for g in report["gate"]), "warnings": report["warnings"], "bytes": nbytes,
            "folder": str(folder.relative_to(self.out)), "status": "measured",
        }  # fmt: skip
        if [g["gate"] for g in row["gate"]] != list(self.plan.evaluation.gates):
            raise PlanError(f"{candidate.text} was not held to every floor of {', '.join(self.plan.evaluation.gates)}")
        # the packed file has the bytes that count, unless another machine would store a format of its own
        if not self.estimated or row["worth"]["kernel"] in ("bitmask", "dense"):
            row["bytes_ratio"] = nbytes.get("packed", nbytes.get("left")) / nbytes["dense"]
        if not self.estimated:
            self._time(row, folder, progress)
        self._judge(row)

    def _time(self, row: dict[str, Any], folder: Path, progress: Progress) -> None:
        plan, file = self.plan, folder / "timing.json"
        asked = {"prompt": plan.prompt, "new": plan.new, "repeats": plan.repeats}
        if not file.is_file():
            # the longer prompts are for `fleet`: what a token of context costs
            prompts = (plan.prompt, _LONGER * plan.prompt)
            write_json(file, bench(variants_of(folder), prompts, plan.new, plan.repeats, progress, fit=True))
        found = json.loads(file.read_text())
        if {name: found[name] for name in asked} != asked:
            raise PlanError(f"{file} was not measured by this plan; delete it, and it is measured again")
        dense, ours = found["variants"][0], found["variants"][-1]

        def seconds(variant: dict[str, Any]) -> list[float]:
            stages = (variant[stage]["samples"] for stage in ("prefill", "decode"))
            return [plan.prompt / a + (plan.new - 1) / b for a, b in zip(*stages, strict=True)]

        ratio = Timing.of([a / b for a, b in zip(seconds(ours), seconds(dense), strict=True)])
        row |= {
            "seconds_ratio": {"value": ratio.seconds, "low": ratio.low, "high": ratio.high},
            "prefill": ours["prefill"]["speedup"], "decode": ours["decode"]["speedup"], "measured": True,
        }  # fmt: skip

    def _judge(self, row: dict[str, Any]) -> None:
        seconds, nbytes = row["seconds_ratio"], row["bytes_ratio"]
        if not row["passed"]:
            row["reason"] = next(g["missed"] for g in row["gate"] if not g["passed"])
        elif reason := self._over_budget(row):
            row["reason"] = reason
        elif not ((self._told and self._faster(seconds)) or nbytes < 1 / GAIN):
            few = (
                ""
                if self._told
                else f"; {self.plan.repeats} runs cannot tell faster from slower, give --repeats {_RUNS}"
            )
            row["reason"] = f"does not pay: {seconds['value']:.2f}x the seconds and {nbytes:.2f}x the bytes{few}"
        elif seconds["value"] > GAIN and (self.plan.limit or ("seconds",))[0] == "seconds":
            row["reason"] = f"takes {seconds['value']:.2f}x the seconds; with --budget bytes=… that would not count"

    @property
    def _told(self) -> bool:
        """True if the high end of the measured ratios is above their true median in 96% of measurements, or nothing is measured."""
        return self.estimated or self.plan.repeats >= _RUNS

    @staticmethod
    def _faster(seconds: dict[str, float]) -> bool:
        return seconds["value"] < 1 / GAIN and seconds["high"] < 1

    def _over_budget(self, row: dict[str, Any], slack: float = 1.0) -> str | None:
        if self.plan.limit is None:
            return None
        kind, limit = self.plan.limit
        takes = row["seconds_ratio"]["value"] if kind == "seconds" else row["bytes_ratio"]
        return f"it takes {takes:.2f}x the {kind}, and the budget is {limit:g}x" if takes > limit * slack else None

    # ------------------------------------------------------------------------------------------------- the decision

    def _result(self) -> dict[str, Any]:
        fit = [r for r in self.rows if _chosen(r)]
        best = min(fit, key=lambda r: (r["seconds_ratio"]["value"], r["bytes_ratio"]), default=None)
        return {
            "format": FORMAT,
            "plan": self.plan.as_dict(),
            "machine": machine(),
            "compute": described(checkpoint.Checkpoint(self.plan.model).dtype),
            "profile": self.here.name,
            "estimated": self.estimated,
            "rows": self.rows,
            "front": [r["candidate"] for r in front(self.rows)],
            "recommended": best["candidate"] if best else "dense",
            "sentence": _sentence(best, self.rows, self.here.name, self.estimated),
        }


def _fits(config: Any, plan: DecidePlan) -> None:
    """Raise PlanError for a request that the model's positions do not hold, before hours of work."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and plan.prompt + plan.new > positions:
        raise PlanError(
            f"a request of {plan.prompt} tokens and {plan.new} new ones was asked for, the model has {positions} positions; lower "
            "--prompt or --new"
        )


def _units(skeleton: Any) -> tuple[str, ...]:
    """The default units of shrink that can go from a model; all, of a model that shrink will refuse."""
    try:
        cuts = cuts_of(skeleton)
    except PlanError:
        return ShrinkPlan.units
    return tuple(unit for unit in ShrinkPlan.units if not cuts.refuses(unit)) or ShrinkPlan.units


def _chosen(row: dict[str, Any]) -> bool:
    return row["status"] == "measured" and row["reason"] is None


def _share(skeleton: Any) -> float:
    """The share of a model's parameters that lies in the linear layers of its blocks."""
    inside = prefixes_of(skeleton)
    weights: list[Any] = [module.weight for name, module, _ in linears(skeleton) if name.startswith(inside)]
    return float(sum(w.numel() for w in weights) / sum(p.numel() for p in skeleton.parameters()))


def front(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The measured candidates that no other beats in both perplexity and seconds, the fastest first."""
    known = [r for r in rows if r["status"] == "measured" and r["quality"]]

    def point(row: dict[str, Any]) -> tuple[float, float]:
        return row["seconds_ratio"]["value"], row["quality"]["ppl_ratio"]["value"]

    kept = []
    for row in known:
        seconds, quality = point(row)
        others = [point(o) for o in known if o is not row]
        if not any(s <= seconds and q <= quality and (s, q) != (seconds, quality) for s, q in others):
            kept.append(row)
    return sorted(kept, key=point)


def _sentence(best: dict[str, Any] | None, rows: list[dict[str, Any]], where: str, estimated: bool) -> str:
    how = f"by estimate for {where}" if estimated else f"measured on {where}"
    if best is None:
        reasons = "; ".join(f"{r['candidate']}: {r['reason']}" for r in rows)
        return f"Ship the dense model: no candidate both passes the floor and pays ({how}). {reasons}."
    seconds, quality = best["seconds_ratio"], best["quality"]
    time = f"{seconds['value']:.2f}x the time" + (
        "" if estimated else f" (10th to 90th percentile {seconds['low']:.2f} to {seconds['high']:.2f})"
    )
    lost = ""
    if quality:
        ratio = quality["ppl_ratio"]
        change = f"{ratio['value'] - 1:+.1%}, 95% interval {ratio['low'] - 1:+.1%} to {ratio['high'] - 1:+.1%}"
        lost = f" Perplexity against the dense model's: {change}."
    passed = ", ".join(g["gate"] for g in best["gate"])
    return (
        f"Ship {best['candidate']}: a request takes {time} and the weights {best['bytes_ratio']:.2f}x the bytes ({how}), and it "
        f"passes {passed}.{lost}"
    )
