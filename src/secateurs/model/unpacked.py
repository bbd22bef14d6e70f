"""Reads the tensors of a packed folder as the plain folder has them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from secateurs.base.errors import CheckpointError, PackError
from secateurs.kernels import formats
from secateurs.kernels.packed_linear import linears
from secateurs.model.checkpoint import Checkpoint


def plain_reader(checkpoint: Checkpoint) -> Callable[[str], Tensor]:
    """A function from the stored name of a packed folder's tensor to that tensor as the plain folder has it.

    Raises CheckpointError if the folder is not packed, of another version, or damaged.
    """
    quantization = checkpoint.raw_config.get("quantization_config")
    if not quantization:
        raise CheckpointError(f"{checkpoint.folder} is not packed: its config.json has no quantization_config")
    if quantization.get("format_version") != formats.VERSION:
        raise CheckpointError(
            f"{checkpoint.folder} is packed in format version {quantization.get('format_version')}, this secateurs reads "
            f"version {formats.VERSION}"
        )
    skeleton = checkpoint.skeleton()
    modules = {f"{name}.weight": (module, transposed) for name, module, transposed in linears(skeleton)}

    def plain(key: str) -> Tensor:
        tensor = checkpoint.read([key])[key]
        if f"{key}_mask" not in checkpoint.file_of:
            return tensor
        target = checkpoint.target_of[key]
        if target not in modules:
            raise CheckpointError(f"{checkpoint.folder}: {key} is packed, and the model has no such layer")
        module, transposed = modules[target]
        weight: Any = module.weight
        shape = (weight.shape[1], weight.shape[0]) if transposed else (weight.shape[0], weight.shape[1])
        try:
            packed = formats.read_bitmask(tensor, checkpoint.read([f"{key}_mask"])[f"{key}_mask"], shape)
        except PackError as error:
            raise CheckpointError(f"{checkpoint.folder}: {key}: {error}; copy or pack it again") from None
        weight_OI = formats.unpack(packed)
        return weight_OI.T.contiguous() if transposed else weight_OI

    return plain
