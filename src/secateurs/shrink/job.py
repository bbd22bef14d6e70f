"""What every stage of a run of shrink needs: the plan, the dense model, what is measured of it, the work folder, the progress."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from secateurs.base.processes import ALONE, Ranks
from secateurs.base.progress import Progress, no_bars, quiet
from secateurs.model import checkpoint
from secateurs.model.batches import Batch, batched
from secateurs.quality.outputs import Subject
from secateurs.shrink import latency
from secateurs.shrink.cuts import Cuts, cuts_of
from secateurs.shrink.plan import ShrinkPlan
from secateurs.shrink.sizes import Sizes, sizes_of
from secateurs.shrink.units import Shape


@dataclass(frozen=True)
class Dense:
    """The dense model. skeleton: the model with its parameters on the meta device."""

    folder: str
    skeleton: Any
    cuts: Cuts
    sizes: Sizes

    @classmethod
    def of(cls, plan: ShrinkPlan, skeleton: Any) -> "Dense":
        """The plan's model. Raises PlanError if it is not of a kind that can be shrunk."""
        # some types' skeletons are not tied, and would count the embeddings twice
        skeleton.tie_weights()
        cuts = cuts_of(skeleton)
        kinds = plan.units or cuts.usual()[0]
        sizes = sizes_of(skeleton, cuts, kinds)
        if "hidden" in kinds and not cuts.refuses("hidden"):
            narrow = replace(cuts.shape, hidden=cuts.shape.hidden // 2)
            half = sizes_of(cuts.skeleton(narrow, range(narrow.layers)), cuts, kinds)
            sizes = replace(sizes, half=replace(half, dense=narrow))
        return cls(plan.model, skeleton, cuts, sizes)

    @property
    def config(self) -> Any:
        return self.skeleton.config

    @property
    def shape(self) -> Shape:
        return self.sizes.dense

    @cached_property
    def decodes(self) -> bool:
        """True if tokens can be decoded one by one with the class's cache, found out on the small instance."""
        return latency.decodes(self.cuts.small.model)

    def open(self) -> tuple[checkpoint.Checkpoint, Any]:
        """The folder and the model without its weights, to be walked and cut in place."""
        source = checkpoint.Checkpoint(self.folder)
        return source, source.skeleton()

    def depths(self, shape: Shape) -> tuple[int, ...]:
        """How many blocks of a model of that shape are timed. Raises PlanError if none can be."""
        size = self.config.dtype.itemsize
        each, whole = (size * count(shape) for count in (self.sizes.block, self.sizes.parameters))
        return latency.depths(shape.layers, each, whole, lambda: self.cuts.refuses("layers"))

    def blank(self, shape: Shape) -> latency.Sample:
        """What is timed of a model of that shape; its weights mean nothing."""
        return self._sample(
            shape, range(shape.layers), lambda config: latency.blank(type(self.skeleton), config, self.config.dtype)
        )

    def stored(self, folder: Path, shape: Shape, kept_layers: Sequence[int]) -> latency.Sample:
        """What is timed of a model of that shape in a folder, with its own weights."""

        def read(config: Any) -> Any:
            # the weights of the other blocks are left where they are
            with no_bars(), quiet():
                return type(self.skeleton).from_pretrained(folder, config=config, dtype=config.dtype).eval()

        return self._sample(shape, kept_layers, read)

    def _sample(self, shape: Shape, kept_layers: Sequence[int], make: Callable[[Any], Any]) -> latency.Sample:
        """Models of the first blocks of a shape. make: gives one of a config."""
        *few, most = self.depths(shape)
        configs = {n: self.cuts.config_of(replace(shape, layers=n), kept_layers[:n]) for n in (*few, most)}
        model = make(configs[most])
        shallow = {n: latency.shallower(model, self.cuts.path, n, configs[n]) for n in few}
        return latency.Sample(shape.layers, {**shallow, most: model})

    def not_loadable(self, shape: Shape) -> str | None:
        """Why transformers would not load a model of that shape, or None."""
        return self.cuts.not_loadable(shape)


@dataclass(frozen=True)
class Job:
    """A run of shrink. work: the folder of intermediate results, for a run that goes on after a kill. subject: what is measured
    of a model that is no causal language model; None for one that is. ranks: those that share the work; parts: how many there were
    when the run was begun. stay: a sentence for each of the usual units that the model cannot lose.
    """

    plan: ShrinkPlan
    dense: Dense
    work: Path
    progress: Progress
    subject: Subject | None = None
    ranks: Ranks = ALONE
    parts: int = 1
    stay: tuple[str, ...] = ()

    def batches(self, windows: Tensor) -> list[Batch]:
        """Calibration windows as the batches of all ranks."""
        return batched(windows, self.parts)

    @property
    def new(self) -> int:
        """Tokens that are decoded after a prompt, to be timed."""
        return self.plan.new if self.subject is None and self.dense.decodes else 0
