"""What every stage of a run of shrink needs: the plan, the dense model, the work folder and the progress display."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from secateurs.base.errors import PlanError
from secateurs.base.progress import Progress
from secateurs.model import checkpoint, families
from secateurs.shrink import units
from secateurs.shrink.latency import blank
from secateurs.shrink.plan import ShrinkPlan
from secateurs.shrink.sizes import Sizes, sizes_of
from secateurs.shrink.units import Shape


@dataclass(frozen=True)
class Dense:
    """The dense model before its weights are read. skeleton: the model with its parameters on the meta device."""

    folder: str
    skeleton: Any
    family: families.Family
    sizes: Sizes

    @classmethod
    def of(cls, plan: ShrinkPlan, skeleton: Any) -> "Dense":
        """The plan's model. Raises PlanError if its family is not known."""
        config = skeleton.config
        # some families' skeletons are not tied, and would count the embeddings twice
        skeleton.tie_weights()
        try:
            family = families.find(config.model_type)
        except ValueError as error:
            raise PlanError(str(error)) from None
        sizes = sizes_of(skeleton, family, config)
        if "hidden" in plan.units and family.residual:
            sizes = replace(sizes, half=_half_as_wide(sizes, skeleton, family))
        return cls(plan.model, skeleton, family, sizes)

    @property
    def config(self) -> Any:
        return self.skeleton.config

    @property
    def shape(self) -> Shape:
        return self.sizes.dense

    def load(self) -> Any:
        """The model with all of its weights."""
        # a new checkpoint: it remembers which tensors it has loaded
        source = checkpoint.Checkpoint(self.folder)
        model = source.skeleton()
        source.load_whole(model)
        return model

    def blank(self, shape: Shape) -> Any:
        """A model of that shape to be timed; its weights mean nothing."""
        raw = units.stated(self.config.to_dict(), self.config, self.family, shape, range(shape.layers))
        return blank(type(self.skeleton), type(self.config)(**raw), self.config.dtype)

    def not_loadable(self, shape: Shape) -> str | None:
        """Why transformers would not load a model of that shape, or None."""
        return units.not_loadable(self.config, self.family, shape)


def _half_as_wide(sizes: Sizes, skeleton: Any, family: families.Family) -> Sizes:
    """What the model counts with half of its residual width."""
    from accelerate import init_empty_weights

    config = skeleton.config
    narrow = replace(sizes.dense, hidden=sizes.dense.hidden // 2)
    with init_empty_weights():
        raw = units.stated(config.to_dict(), config, family, narrow, range(narrow.layers))
        half = type(skeleton)._from_config(type(config)(**raw))
    half.tie_weights()
    return sizes_of(half, family, half.config)


@dataclass(frozen=True)
class Job:
    """A run of shrink. work: the folder of intermediate results, for a run that goes on after a kill."""

    plan: ShrinkPlan
    dense: Dense
    work: Path
    progress: Progress
