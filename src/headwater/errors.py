"""The tree of errors. Every message says what was given, what was expected, and how to mend it.

    HeadwaterError
    ├── InputError            a bad argument, batch, task or query (also a ValueError)
    │   ├── TaskError         the loss or measure is not one number per example
    │   └── QueryError        a query that the model or the task cannot take
    ├── RunError              a run directory that cannot be used
    │   ├── DamagedFile       a file whose checksum does not match
    │   ├── MissingCheckpoint a checkpoint that the manifest names and the disk does not hold
    │   ├── ModelMismatch     recorded with another model
    │   ├── DataMismatch      recorded with another dataset, or the dataset changed since
    │   ├── ReplayMismatch    training the recorded run again gives other weights than were recorded
    │   └── UnknownOptimizer  an optimizer whose dynamics Headwater does not know
    ├── GradientError         gradients that cannot be trusted
    │   ├── NotFinite         NaN or infinity in a loss, a gradient or a curvature
    │   ├── GradientMismatch  captured gradients differ from autograd's
    │   └── BatchCoupling     one example's loss depends on another's (BatchNorm in train mode)
    ├── StorageError          the disk refuses (full, read-only)
    └── MissingExtra          an optional library that this call needs
"""

from __future__ import annotations


class HeadwaterError(Exception):
    """Root of all errors raised on purpose. ``given``: what was found; ``expected``: what was needed; ``mend``: what to do."""

    def __init__(self, given: str, expected: str = "", mend: str = "") -> None:
        self.given, self.expected, self.mend = given, expected, mend
        parts = [given, expected and f"Expected: {expected}", mend and f"To mend it: {mend}"]
        super().__init__("\n".join(part for part in parts if part))


class InputError(HeadwaterError, ValueError):
    """A bad argument, batch, task or query."""


class TaskError(InputError):
    """The loss or the measure is not one finite number per example."""


class QueryError(InputError):
    """A query that the model or the task cannot take."""


class RunError(HeadwaterError):
    """A run directory that cannot be used."""


class DamagedFile(RunError):
    """A file whose content does not match its checksum."""


class MissingCheckpoint(RunError):
    """A checkpoint that the manifest names and the disk does not hold."""


class ModelMismatch(RunError):
    """The run was recorded with another model."""


class DataMismatch(RunError):
    """The run was recorded with another dataset, or the dataset changed since."""


class ReplayMismatch(RunError):
    """Training the recorded run again gives other weights or losses than were recorded: something it depended on escaped the record.

    ``steps``: (first, last) step that can be to blame, None where it was plain before any step. ``escaped``: the names of what was found
    to explain it, the surest first ("dropout", "clipping", ...); empty where nothing tested does.
    """

    def __init__(self, given: str, expected: str = "", mend: str = "", *, steps: tuple[int, int] | None = None, escaped: tuple[str, ...] = ()) -> None:
        super().__init__(given, expected, mend)
        self.steps, self.escaped = steps, escaped


class UnknownOptimizer(RunError):
    """An optimizer whose dynamics Headwater does not know."""


class GradientError(HeadwaterError):
    """Gradients that cannot be trusted."""


class NotFinite(GradientError):
    """NaN or infinity in a loss, a gradient or a curvature."""


class GradientMismatch(GradientError):
    """Captured per-example gradients differ from plain autograd's."""


class BatchCoupling(GradientError):
    """One example's loss depends on the other examples of its batch."""


class StorageError(HeadwaterError):
    """The disk refuses: full, read-only or gone."""


class MissingExtra(HeadwaterError, ImportError):
    """An optional library that this call needs is not installed."""
