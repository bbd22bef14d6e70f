"""Recommends what to ship on this machine: candidates are estimated, pruned, held to the quality floor and timed.

The run directory holds plan.json, profile.json, candidates/NAME (each a run directory of prune or shrink, with its packed model and
timing.json) and decide.json. After a kill, what was measured is read and not measured again. So candidates may be made by other
processes first, here or elsewhere (jobs.py): the decision finds them finished.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from secateurs.base.device import machine
from secateurs.base.errors import DeviceError, PlanError, SecateursError
from secateurs.base.files import write_json
from secateurs.base.precision import described
from secateurs.base.progress import Progress, silent, ticker
from secateurs.base.run_directory import claim, locked, read_object, resolved, unchanged
from secateurs.decide import beside_dense, beside_rivals, through_kernels
from secateurs.decide.jobs import Job, run, shrink_command
from secateurs.decide.plan import DecidePlan
from secateurs.decide.realize import GAIN, Candidate, Worth, machine_named, realize
from secateurs.decide.verdict import LEFT_OUT, front, sentence
from secateurs.kernels.formats import DTYPES
from secateurs.kernels.packed_linear import linears
from secateurs.machine.bench import Variant, bench, dense_variants, variants_of
from secateurs.machine.hardware import Hardware
from secateurs.machine.probe import Question, probe, shapes_of
from secateurs.machine.profile import DeviceProfile
from secateurs.matrix.grids import Grid
from secateurs.model import checkpoint
from secateurs.model.blocks import prefixes_of
from secateurs.model.source import trusted
from secateurs.pack.folder import pack_run
from secateurs.prune.plan import Plan
from secateurs.prune.record import Report
from secateurs.prune.run import Run
from secateurs.quality import evaluation
from secateurs.shrink.budget import Budget
from secateurs.shrink.plan import ShrinkPlan
from secateurs.shrink.run import shrink

Show = Callable[[list[dict[str, Any]]], None]

FORMAT = 1
# of so many runs the slowest is above the median in 1 - 2^-5 of measurements; of ten the second slowest is more often
_RUNS = 5
# a second prompt is so many times as long
_LONGER = 4


def decide(
    plan: DecidePlan,
    out: str | Path,
    progress: Progress = silent,
    show: Show = lambda rows: None,
    jobs: int = 1,
    collect: bool = False,
) -> dict[str, Any]:
    """Begin or go on with a decision, and return decide.json. show: called with all rows whenever one changes.

    jobs: candidates that are made at once, in processes of their own; packing and timing come after, one by one. collect: decide
    between those that are finished, and leave out the others. Where no candidate pays, the result's `recommended` is 'dense'.
    Raises SecateursError.
    plan: what is asked. out: the run directory. progress: called with (stage, done, total).

    Example, made short; which answer it gives depends on the machine:

        >>> import secateurs as sc
        >>> floor = sc.Evaluation(windows=4, seqlen=64, gates=("ppl<=+50%",))
        >>> short = {"prompt": 8, "new": 4, "repeats": 2, "rivals": False, "integers": False, "effort": "fast"}
        >>> text = sc.Calibration(samples=8, seqlen=64)
        >>> found = sc.decide(sc.DecidePlan("my-model", floor, ("0.5",), calibration=text, **short), "decision")
        >>> found["recommended"] in ("0.5", "dense"), found["sentence"].startswith("Ship")
        (True, True)
    """
    return _Decision(plan, Path(out).expanduser(), progress, show).complete(jobs, collect)


def commands(plan: DecidePlan, out: str | Path, progress: Progress = silent) -> tuple[list[str], list[str]]:
    """Begin a decision, and return a command line for each candidate that may pay, in any order and on any machine that sees the
    folder; and sentences on those that only the decision itself can make.
    """
    return _Decision(plan, Path(out).expanduser(), progress, lambda rows: None).commands()


class _Decision:
    def __init__(self, plan: DecidePlan, out: Path, progress: Progress, show: Show) -> None:
        self.plan = dataclasses.replace(plan, model=resolved(plan.model))
        self.out, self.progress, self.show = out, progress, show
        self.errors: list[SecateursError] = []
        self.left_out: list[str] = [] if self.plan.integers else [LEFT_OUT]

    @contextmanager
    def _begun(self) -> Iterator[None]:
        """A context in which the run directory is this decision's, and what no candidate needs to be made for is known."""
        source = checkpoint.Checkpoint(self.plan.model)
        if not evaluation.predicts_next_token(source):
            raise PlanError(
                f"{self.plan.model} is no causal language model, and a decision compares seconds of a prompt and of new "
                "tokens; prune it, and compare by `secateurs eval`"
            )
        skeleton = source.skeleton()
        self.plan.fits(skeleton.config)
        self.dtype = DTYPES.get(skeleton.config.dtype, "fp32")
        self.share = _share(skeleton)
        evaluation.check(self.plan.evaluation)
        given = self._given_profile()
        claim(self.out, self.plan.as_dict())
        with locked(self.out):
            # finished candidates were made from this model
            unchanged(self.out, {self.plan.model: source.fingerprint()})
            self.here = given if given is not None else self._own_profile()
            self.estimated = not (isinstance(self.here, DeviceProfile) and self.here.of_here)
            self.rows: list[dict[str, Any]] = [self._estimate(c) for c in self.plan.parsed]
            # the mildest of a kind first: if it misses the floor, those that remove more are not tried
            self.order = sorted(
                range(len(self.rows)), key=lambda i: -self.plan.parsed[i].kept * self.plan.parsed[i].bits
            )
            yield

    def commands(self) -> tuple[list[str], list[str]]:
        with self._begun():
            return [job.line for job in self._jobs()], [
                f"{c.text} is left to `secateurs decide` itself: its budget is a time, measured where nothing else runs"
                for c in self.plan.parsed
                if self._timed(c)
            ]

    def complete(self, jobs: int, collect: bool) -> dict[str, Any]:
        with self._begun():
            self.show(self.rows)
            if jobs > 1 and not collect:
                self._make(jobs)
            for i in self.order:
                if collect:
                    self._leave_out(i)
                self._settle(i)
                self.show(self.rows)
            if collect and not any(r["status"] == "measured" for r in self.rows) and not self.errors:
                raise PlanError(
                    f"none of the candidates is finished in {self.out / 'candidates'}; --plan prints the commands that make them"
                )
            if self.errors and not any(r["status"] == "measured" for r in self.rows):
                # every candidate failed by error, so there is nothing to decide on
                raise self.errors[0]
            result = self._result()
            write_json(self.out / "decide.json", result)
            shutil.rmtree(self.out / "rivals", ignore_errors=True)
        return result

    # ------------------------------------------------------------------------------------------------------ jobs

    def _timed(self, candidate: Candidate) -> bool:
        return candidate.kind == "shrink" and Budget.parse(candidate.budget).timed

    def _jobs(self) -> list[Job]:
        """Those of all candidates that may pay. Candidates that quantize one smaller model share a job, which makes that first."""
        found: dict[str, list[int]] = {}
        for i in self.order:
            candidate = self.plan.parsed[i]
            if self.rows[i]["status"] != "dropped" and not self._timed(candidate):
                shrunk = candidate.kind == "shrink"
                found.setdefault(self._smaller(candidate) if shrunk else candidate.text, []).append(i)
        return [self._job([self.plan.parsed[i] for i in group]) for group in found.values()]

    def _job(self, group: list[Candidate]) -> Job:
        made = []
        if group[0].kind == "shrink":
            made.append(shrink_command(self.plan.shrink_plan(group[0]), self._folder(self._smaller(group[0]))))
        for candidate in group:
            asked = self._asked(candidate)
            if isinstance(asked, Plan):
                folder = self._folder(candidate.text)
                file = self.out / "work" / "plans" / f"{folder.name}.json"
                write_json(file, asked.as_dict())
                made.append(("prune", "--plan", str(file), "--out", str(folder)))
        trust = ("--trust-remote-code",) if trusted() else ()
        return Job(tuple(c.text for c in group), tuple((*command, *trust) for command in made))

    def _make(self, at_once: int) -> None:
        """Make the candidates in processes of their own."""
        jobs, threads = self._jobs(), torch.get_num_threads()
        index = {c.text: i for i, c in enumerate(self.plan.parsed)}

        def wanted(job: Job) -> bool:
            return any(self._hopeless(index[text]) is None for text in job.candidates)

        self.progress(label := "making candidates", 0, len(jobs))
        run(jobs, at_once, threads, self.out / "work" / "jobs.log", wanted, ticker(self.progress, label, len(jobs)))

    def _hopeless(self, i: int) -> str | None:
        """Why a candidate will not hold the floor: one that removes less does not."""
        for other, row in zip(self.plan.parsed, self.rows, strict=True):
            gate = row["gate"] or (self._finished(other) or {"gate": []})["gate"]
            missed = [g["missed"] for g in gate if g["verdict"] == "missed"]
            if missed and other.milder(self.plan.parsed[i]):
                return f"{other.text} removes less and already fails: {missed[0]}"
        return None

    def _finished(self, candidate: Candidate) -> dict[str, Any] | None:
        """The report of a candidate that was made, or None."""
        file = self._folder(candidate.text) / "report.json"
        report = read_object(file) if file.is_file() else {"status": "absent"}
        # shrink writes its report when all is done
        return report if report.get("status", "complete") == "complete" else None

    def _leave_out(self, i: int) -> None:
        """Drop a candidate that is not finished."""
        if self.rows[i]["status"] != "dropped" and not self._finished(self.plan.parsed[i]):
            why = "it is not finished, and only those that are were collected"
            self.rows[i] |= {"status": "dropped", "reason": why}

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
        bits = {c.grid.bits for c in self.plan.parsed if c.grid}
        if any(c.kind == "bits" for c in self.plan.parsed):
            bits |= {8, 4}
        if at_hand is None or not self._tells(at_hand, bits):
            masks = [c for c in self.plan.parsed if c.kind == "mask"]
            # what would have to change is said of more zeros than were asked for
            sparsities = tuple(sorted({0.5, 0.7, 0.9} | {c.sparsity for c in masks if c.sparsity}))
            question = Question(
                shapes_of(self.plan.model, 2), sparsities, ("unstructured",), tokens=(1, 256), dtypes=(self.dtype,),
                bits=tuple(sorted(bits)), seconds_per_cell=1.0,
            )  # fmt: skip
            at_hand = probe(question, self.progress)
        at_hand.write(file)
        return at_hand

    def _tells(self, profile: DeviceProfile, bits: set[int]) -> bool:
        """True if a profile has rows for this dtype, and beside it for integers of so many bits."""
        known = profile.speedup(self.dtype, 0.5, 1) is not None
        return known and all(profile.relative(self.dtype, Grid(b), 0.5, 1) is not None for b in bits)

    def _estimate(self, candidate: Candidate) -> dict[str, Any]:
        worth = realize(candidate, self.here, self.dtype)
        all_of_them = None
        if candidate.kind == "mask" and candidate.grid and not candidate.plain:
            named = (c.text for c in self.plan.parsed if c.plain and c.grid == candidate.grid)
            text = next(named, str(candidate.grid))
            whole = dataclasses.replace(candidate, text=text, pattern="unstructured", sparsity=0.0)
            all_of_them = realize(whole, self.here, self.dtype)
        row: dict[str, Any] = {
            "candidate": candidate.text, "status": "estimated", "reason": None, "worth": dataclasses.asdict(worth), "quality": None,
            "gate": [], "passed": None, **self._as_row(worth, candidate), "prefill": 1 / worth.prefill,
            "decode": 1 / worth.decode, "measured": False, "folder": None, "warnings": [], "bits": None, "through": None,
            "rivals": [],
        }  # fmt: skip
        if not worth.pays:
            row |= {"status": "dropped", "reason": f"would not pay: {worth.why}"}
        elif all_of_them and not worth.pays_beside(all_of_them):
            row |= {"status": "dropped", "reason": f"would not pay beside {all_of_them.candidate}: {worth.why}"}
        elif self.estimated and self._timed(candidate):
            why = "its budget is a time, which can only be measured on the machine itself; give params, bytes or flops"
            row |= {"status": "dropped", "reason": why}
        elif not candidate.budget.startswith("seconds") and (reason := self._over_budget(row, slack=GAIN)):
            row |= {"status": "dropped", "reason": f"by estimate, {reason}"}
        return row

    def _as_row(self, worth: Worth, candidate: Candidate) -> dict[str, Any]:
        """Estimated bytes and seconds of a request, over the dense model's."""
        seconds = self._estimated_seconds(worth, candidate)
        return {"bytes_ratio": self._of_all(worth.nbytes, candidate), "seconds_ratio": seconds}

    def _of_all(self, fraction: float, candidate: Candidate) -> float:
        """A fraction of the pruned layers as a fraction of the whole model, whose embeddings and head stay as they are, but for
        what shrink removes of them."""
        shrunk = candidate.kept if candidate.kind == "shrink" else 1.0
        return shrunk * (1 - (1 - fraction / shrunk) * self.share)

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
        if (why := self._hopeless(i)) is not None:
            row |= {"status": "dropped", "reason": why}
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
        folder, label = self._folder(candidate.text), candidate.text

        def progress(what: str, done: int, total: int) -> None:
            self.progress(f"{label}: {what}", done, total)

        asked, smaller = self._asked(candidate), None
        if candidate.kind == "shrink":
            folder_of_it = self._folder(self._smaller(candidate))
            smaller = shrink(self.plan.shrink_plan(candidate), folder_of_it, progress, self.out / "work")
        if isinstance(asked, ShrinkPlan):
            assert smaller is not None
            report, nbytes = smaller, smaller["bytes"]
        else:
            made = Run(asked, folder, progress, self.out / "work").complete()
            work = self.out / "work" / folder.name
            if smaller is not None and not made.gate:
                self._against_dense(folder, work, made, smaller["bytes"]["dense"], progress)
            shutil.rmtree(work, ignore_errors=True)
            report = json.loads((folder / "report.json").read_text())
            if report["packed"] is None:
                profile = self.here if isinstance(self.here, DeviceProfile) and not self.estimated else None
                pack_run(folder, None, profile, progress)
                report = json.loads((folder / "report.json").read_text())
            nbytes, row["bits"] = report["bytes"], report["totals"]["bits"]
            if row["bits"] is not None:
                row["through"] = through_kernels.of_run(folder, self.plan.model, self.plan.evaluation, progress)
        row |= {
            "quality": report["quality"], "gate": report["gate"], "compared": report.get("compared", {}),
            "passed": all(g["passed"] for g in report["gate"]), "warnings": report["warnings"], "bytes": nbytes,
            "folder": str(folder.relative_to(self.out)), "status": "measured",
        }  # fmt: skip
        if [g["gate"] for g in row["gate"]] != list(self.plan.evaluation.gates):
            raise PlanError(f"{candidate.text} was not held to every floor of {', '.join(self.plan.evaluation.gates)}")
        # the packed file has the bytes that count, unless another machine would store a format of its own
        if not self.estimated or row["worth"]["kernel"] in ("bitmask", "integers", "dense"):
            row["bytes_ratio"] = nbytes.get("packed", nbytes.get("left")) / nbytes["dense"]
        if not self.estimated:
            self._time(row, candidate, folder, progress)
        self._judge(row)

    def _smaller(self, candidate: Candidate) -> str:
        """The candidate of shrink that one is, or that it quantizes."""
        return candidate.text.rpartition("+")[0] if candidate.grid else candidate.text

    def _asked(self, candidate: Candidate) -> Plan | ShrinkPlan:
        """What prune or shrink is asked for."""
        found = self.plan.plan_of(candidate)
        if candidate.kind != "shrink":
            return found
        return dataclasses.replace(found, model=str(self._folder(self._smaller(candidate)) / "model"))

    def _folder(self, text: str) -> Path:
        return self.out / "candidates" / re.sub(r"[^\w.=]+", "-", text)

    def _against_dense(self, folder: Path, work: Path, report: Report, nbytes: int, progress: Progress) -> None:
        """Measure a smaller model that was quantized against the dense model, not against the smaller one that it was made from."""
        dense, result = checkpoint.Checkpoint(self.plan.model), checkpoint.Checkpoint(folder / "model")
        calibration = self.plan.calibration
        work.mkdir(exist_ok=True)
        found = evaluation.measured(
            dense, result, self.plan.evaluation, calibration.seed, progress, work, self.out / "work", calibration.source
        )
        for name, value in found.as_dict().items():
            setattr(report, name, value)
        report.warnings += [
            *found.warnings,
            f"quality and bytes are held against {self.plan.model}, before it was shrunk",
        ]
        report.bytes["dense"] = nbytes
        report.write(folder / "report.json")

    def _time(self, row: dict[str, Any], candidate: Candidate, folder: Path, progress: Progress) -> None:
        plan, file = self.plan, folder / "timing.json"
        asked = {"prompt": plan.prompt, "new": plan.new, "repeats": plan.repeats}
        if not file.is_file():
            # the longer prompts are for `fleet`: what a token of context costs
            prompts = (plan.prompt, _LONGER * plan.prompt)
            ways = variants_of(folder)
            if candidate.kind == "shrink" and candidate.grid:
                # its run knows the smaller model as the dense one
                ways = [*dense_variants(plan.model), Variant("packed", str(folder / "packed"), "packed")]
            ways, said = beside_rivals.ways(ways, plan, self.out, progress)
            timed = bench(ways, prompts, plan.new, plan.repeats, progress, fit=True)
            write_json(file, timed | {"left_out": [*said, *timed["left_out"]]})
        found = json.loads(file.read_text())
        if {name: found[name] for name in asked} != asked:
            raise PlanError(f"{file} was not measured by this plan; delete it, and it is measured again")
        dense, ours = found["variants"][0], found["variants"][-1]
        row |= {
            "seconds_ratio": beside_rivals.ratio(ours, dense, found), "prefill": ours["prefill"]["speedup"],
            "decode": ours["decode"]["speedup"], "measured": True, "rivals": beside_rivals.beside(found),
        }  # fmt: skip
        self.left_out += found["left_out"]

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
        texts = {c.text: c for c in self.plan.parsed}
        rivals = beside_rivals.of_rows(self.rows, self.plan, self.out, self.progress)
        best, zeros = beside_dense.compare(
            self.rows, texts, lambda c: self._as_row(realize(c, self.here, self.dtype), c)
        )
        return {
            "format": FORMAT,
            "plan": self.plan.as_dict(),
            "machine": machine(),
            "compute": described(checkpoint.Checkpoint(self.plan.model).dtype),
            "profile": self.here.name,
            "estimated": self.estimated,
            "rows": self.rows,
            "front": [r["candidate"] for r in front(self.rows)],
            "zeros": zeros,
            "rivals": rivals,
            "left_out": list(dict.fromkeys([*self.left_out, *beside_rivals.lacks(self.plan, self.estimated)])),
            "recommended": best["candidate"] if best else "dense",
            "sentence": sentence(best, texts, self.rows, zeros, rivals, self.here.name, self.estimated),
        }


def _share(skeleton: Any) -> float:
    """The share of a model's parameters that lies in the linear layers of its blocks."""
    inside = prefixes_of(skeleton)
    weights: list[Any] = [module.weight for name, module, _ in linears(skeleton) if name.startswith(inside)]
    return float(sum(w.numel() for w in weights) / sum(p.numel() for p in skeleton.parameters()))
