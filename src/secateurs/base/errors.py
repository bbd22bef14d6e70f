"""The errors that users see, as a tree: each class says what is at fault, and the exit code of the command line.

    SecateursError (1)
    ├── PlanError (2)           the request itself: a pattern, gate or option that cannot be read
    ├── CalibrationError (1)    the text: missing, too short, not readable
    ├── CheckpointError (1)     the model's files: missing, truncated, not finite, of an unknown class
    ├── OutputError (1)         the run directory: not ours, not empty, not writable, full
    ├── LayerError (1)          one layer's numbers: not finite, a Gram matrix that does not factor
    ├── PackError (1)           a packed matrix: weights a format cannot hold, bytes that are not the format
    ├── DeviceError (1)         this machine lacks what was asked: an instruction set, a GPU, a compiled kernel
    ├── RankError (1)           another process of the same run ended
    ├── VerifyError (1)         the result on disk is not what the report says
    ├── QualityGateError (3)    a quality gate was missed; the results are kept
    ├── NothingPaysError (5)    no candidate passes the gates and is worth shipping on this machine
    └── SkippedLayersError (4)  layers could not take the pattern and --allow-skips was not given; the results are kept

Inner functions raise ValueError with the numbers; the stage that called them adds the layer's name.
"""

import difflib
from collections.abc import Iterable


class SecateursError(Exception):
    """An error that a user is told in one sentence.

    exit_code is that of the command line.

    Example:

        >>> import secateurs as sc
        >>> try:
        ...     sc.Plan(pattern="4:2")
        ... except sc.SecateursError as error:
        ...     print(type(error).__name__, error.exit_code)
        PlanError 2
    """

    exit_code = 1


class PlanError(SecateursError):
    """The request cannot be read or contradicts itself."""

    exit_code = 2


class CalibrationError(SecateursError):
    """The calibration or evaluation text cannot be used."""


class CheckpointError(SecateursError):
    """The model's files cannot be used."""


class OutputError(SecateursError):
    """The run directory cannot be written."""


class LayerError(SecateursError):
    """One layer's numbers cannot be used."""


class VerifyError(SecateursError):
    """The files on disk are not what the report says."""


class RankError(SecateursError):
    """Another process of the same run ended before the run did."""


class QualityGateError(SecateursError):
    """A quality gate was missed."""

    exit_code = 3


class NothingPaysError(SecateursError):
    """No candidate is worth shipping: ship the dense model."""

    exit_code = 5


class SkippedLayersError(SecateursError):
    """Layers were left dense because they cannot take the pattern."""

    exit_code = 4


class PackError(SecateursError):
    """Weights cannot be stored in a format, or stored ones are not what the format says."""


class DeviceError(SecateursError):
    """This machine lacks what was asked for: an instruction set, a GPU, a compiled kernel."""


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean X?' if a known word is near, else ''."""
    found = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean '{found[0]}'?" if found else ""


def said(error: Exception, lines: int = 1) -> str:
    """The first lines of what another library's exception says; the name of its class if it says nothing."""
    found = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(found[:lines]) or type(error).__name__
