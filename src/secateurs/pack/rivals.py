"""The dense model as people would run it otherwise: ways for `bench` to time beside ours.

torch.compile, and where its package is installed llama.cpp, at the bits of the model and rounded to 8 and 4 bits by llama.cpp's own
rule. What cannot be had is said in a sentence.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from secateurs.base.errors import SecateursError
from secateurs.base.files import replace
from secateurs.base.progress import Progress, silent
from secateurs.machine import llama_cpp
from secateurs.machine.bench import Variant
from secateurs.model.checkpoint import Checkpoint
from secateurs.pack import to_gguf
from secateurs.pack.on_grids import OnGrids

ROUNDED = (8, 4)
_NOT_INSTALLED = (
    f"llama.cpp was not run, its package is not installed (pip install {llama_cpp.PACKAGE}): whether the dense model is faster in "
    "it, in 16, 8 or 4 bits, is not known"
)


@contextmanager
def beside(
    variants: Sequence[Variant], wanted: bool, folder: Path, progress: Progress = silent
) -> Iterator[tuple[list[Variant], list[str]]]:
    """The variants with the first one's rivals before the last one, if they are wanted, and sentences on what is missing. The
    rivals' files lie in the folder until the context ends."""
    if not wanted:
        yield list(variants), []
        return
    place = folder / "rivals"
    try:
        dense = variants[0].folder
        ways, said = in_llama_cpp(dense, place, progress)
        yield [*variants[:-1], in_torch_compile(dense), *ways, variants[-1]], said
    finally:
        shutil.rmtree(place, ignore_errors=True)


def in_torch_compile(dense: str) -> Variant:
    """A folder under torch.compile, which takes minutes to compile."""
    return Variant("dense, torch.compile", dense, "compiled", rival=True)


def in_llama_cpp(dense: str, place: Path, progress: Progress = silent) -> tuple[list[Variant], list[str]]:
    """A dense folder in llama.cpp, the unrounded one first, and sentences on what is missing. place: where GGUF files are made, or
    lie from an earlier run.
    """
    if not llama_cpp.installed():
        return [], [_NOT_INSTALLED]
    ways: list[Variant] = []
    said: list[str] = []
    for bits in (None, *ROUNDED):
        file = place / (f"q{bits}_0.gguf" if bits else "dense.gguf")
        try:
            left = _made(dense, file, bits, progress)
        except SecateursError as error:
            # what holds for one number of bits holds for the others
            return ways, [*said, f"llama.cpp was not run: {error}"]
        if left:
            said.append(
                f"{len(left)} matrices keep their bits in the file of {bits} bits for llama.cpp, first {left[0]}"
            )
        ways.append(_way(dense, file, bits))
    return ways, said


def _way(dense: str, file: Path, bits: int | None) -> Variant:
    stored = bits or 8 * Checkpoint(dense).dtype.itemsize
    return Variant(f"llama.cpp, {stored} bits", str(file), "llama.cpp", weights=None if bits else dense, rival=True)


def _made(dense: str, file: Path, bits: int | None, progress: Progress) -> list[str]:
    """Write the file if it is absent; returns the matrices that could not be rounded."""
    left: list[str] = []
    if not file.is_file():
        replace(file, lambda part: left.extend(to_gguf.prepare(OnGrids.open(dense), bits)(part, progress)["left"]))
    return left
