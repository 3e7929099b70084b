"""The errors that a user can cause: each says what is wrong, where, and how to mend it."""

UNFINISHED = 75
"""Exit status of a run that was stopped before its end and can be resumed (EX_TEMPFAIL)."""


class CrysldnetError(Exception):
    """Base of every error that is the input's fault; the command line prints it without a traceback."""


class ConfigError(CrysldnetError):
    """A key, type or value of the configuration is wrong.

    Args:
        message: what is wrong.
        key: the dotted path of the key, so that the file it came from can be named.
    """

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message)
        self.key = key


class DataError(CrysldnetError):
    """A crystal, table or store can't be used."""


class CheckpointError(CrysldnetError):
    """A checkpoint is damaged, of another model or of a newer format."""


class DeviceError(CrysldnetError):
    """The machine doesn't have the devices that were asked for."""


class Interrupted(CrysldnetError):
    """A run was stopped before its end; it can be resumed."""


class DivergedError(CrysldnetError):
    """A loss or a gradient isn't finite."""
