"""Names that other people's code and scripts hold on to: a change here is a change of the interface, and is meant."""

from __future__ import annotations

import inspect
from types import ModuleType

import scaletrain
from scaletrain import config, errors, launcher

EXIT_CODES = {
    "ScaletrainError": 70,
    "InputError": 65,
    "ConfigError": 65,
    "CorpusError": 65,
    "TokenizerError": 65,
    "ModelError": 65,
    "CheckpointError": 65,
    "WorldSizeError": 65,
    "DeviceError": 65,
    "OccupiedError": 65,
    "LeaseLostError": 65,
    "DataBudgetError": 66,
    "DivergedError": 72,
    "StorageError": 74,
    "RequeueError": 75,
    "PeerLostError": 76,
    "RoundsError": 70,
    "RefusedError": 77,
    "UndecidedError": 78,
}


def own_names(module: ModuleType) -> set[str]:
    """The public functions and classes that are written in ``module``."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__ and callable(value)
    }


def test_the_package() -> None:
    assert scaletrain.__all__ == ["__version__"]


def test_the_errors_and_their_exit_codes() -> None:
    classes = {
        name: value
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.ScaletrainError)
    }
    assert {name: cls.exit_code for name, cls in classes.items()} == EXIT_CODES


def test_the_configuration_mechanism() -> None:
    assert own_names(config) == {
        *("alternatives", "decode", "dump", "hints_of", "load", "load_tree", "members", "merge", "redacted", "to_tree")
    }


def test_the_launcher() -> None:
    assert launcher.__all__ == ["Backend", "DeepspeedConfig", "Job", "LaunchConfig", "LocalConfig", "launch"]
