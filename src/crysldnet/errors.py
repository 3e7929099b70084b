"""User errors: each states what is wrong, where, and the remedy."""

UNFINISHED = 75
"""Exit status of an interrupted run that can be resumed (EX_TEMPFAIL)."""


class CrysldnetError(Exception):
    """Base of all user errors; the command line prints them without a traceback."""


class ConfigError(CrysldnetError):
    """A key, type or value of the configuration is invalid.

    Args:
        message: what is wrong.
        key: dotted path of the key, to name the file that set it.
    """

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message)
        self.key = key


class DataError(CrysldnetError):
    """A crystal, table or store is invalid."""


class CheckpointError(CrysldnetError):
    """A checkpoint is damaged, of another model or of a newer format."""


class DeviceError(CrysldnetError):
    """The machine lacks the requested devices."""


class Interrupted(CrysldnetError):
    """A run was interrupted and can be resumed."""


class DivergedError(CrysldnetError):
    """A loss or a gradient isn't finite."""
