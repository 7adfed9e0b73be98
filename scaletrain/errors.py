"""What can go wrong, and the exit code that says so to whatever started the job.

::

    ScaletrainError                 70  a bug in scaletrain (also any exception that is not in this tree)
    ├── InputError                  65  something the user gave cannot be used
    │   ├── ConfigError                 a setting: unknown, mistyped, out of range, in contradiction
    │   ├── CorpusError                 a corpus or prepared data set: missing, empty, damaged
    │   ├── TokenizerError              a tokenizer that does not fit the data or the model
    │   ├── ModelError                  a model folder or architecture that cannot be used
    │   ├── CheckpointError             a checkpoint: missing where one was asked for, or of another run
    │   ├── WorldSizeError              a number of ranks that the plan's slots do not fit
    │   ├── DeviceError                 a device that this machine does not have
    │   └── OccupiedError               a folder that another job is writing into
    │       └── LeaseLostError              this job was taken for dead, and another one has its folder
    ├── DataBudgetError             66  more data is damaged than may be passed over
    ├── DivergedError               72  the loss or the gradient is not finite
    ├── StorageError                74  a disk that is full, read-only, or failing
    ├── RequeueError                75  stopped on request; the same command continues
    ├── PeerLostError               76  another rank died or did not answer in time
    ├── RefusedError                77  the gate refused a candidate; what is published stays as it was
    ├── UndecidedError              78  the gate could not tell; what is published stays as it was
    └── RoundsError                 70  ranks ran different modules in the same round

Exit 0 means done. Every message names the field, the value received, the rule it broke and the remedy.
"""

from __future__ import annotations


class ScaletrainError(Exception):
    """Base of every error that scaletrain raises on purpose."""

    exit_code: int = 70


class InputError(ScaletrainError):
    """Something that the user gave cannot be used.

    ``field`` is what the user would look for (a dotted config path, a file), ``value`` what was found there, ``rule`` what it
    should have been and ``remedy`` what to do next.
    """

    exit_code: int = 65

    def __init__(self, field: str, value: object, rule: str, remedy: str = "") -> None:
        self.field, self.value, self.rule, self.remedy = field, value, rule, remedy
        message = f"{field}: got {value!r}; {rule}"
        super().__init__(f"{message}. {remedy}" if remedy else message)


class ConfigError(InputError):
    """A setting that is unknown, mistyped, out of range, or in contradiction with another."""


class CorpusError(InputError):
    """A corpus or prepared data set that is missing, empty or damaged."""


class TokenizerError(InputError):
    """A tokenizer that does not fit the shards or the model."""


class ModelError(InputError):
    """A model folder or architecture that cannot be used."""


class CheckpointError(InputError):
    """A checkpoint that is missing where one was asked for, damaged, or of another run."""


class WorldSizeError(InputError):
    """A number of ranks that would waste too many slots of the plan."""


class DeviceError(InputError):
    """A device that was asked for and is not there."""


class OccupiedError(InputError):
    """A folder that another job is writing into."""


class LeaseLostError(OccupiedError):
    """This job was taken for dead while it was suspended, and another one has its folder: it must not publish anything."""


class DataBudgetError(ScaletrainError):
    """More data is damaged than may be passed over."""

    exit_code: int = 66


class DivergedError(ScaletrainError):
    """The loss or the gradient is not finite."""

    exit_code: int = 72


class StorageError(ScaletrainError):
    """A disk that is full, read-only or failing; what was there before is untouched."""

    exit_code: int = 74


class RequeueError(ScaletrainError):
    """The run stopped on request after a checkpoint; the same command continues it."""

    exit_code: int = 75


class PeerLostError(ScaletrainError):
    """Another rank died or did not answer in time."""

    exit_code: int = 76


class RefusedError(ScaletrainError):
    """The gate found a task broken; the candidate is kept and not published."""

    exit_code: int = 77


class UndecidedError(ScaletrainError):
    """The gate's examples are too few to tell; the candidate is kept and not published."""

    exit_code: int = 78


class RoundsError(ScaletrainError):
    """Ranks were about to run different modules in the same round, which would mix their gradients silently."""
