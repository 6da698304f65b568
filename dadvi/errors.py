"""The errors dadvi raises. Each message tells the value seen, the limit and the remedy.

Every class takes one string, so that an error raised on a worker survives the way back to the coordinator.
"""


class DadviError(Exception):
    """Base of every error that dadvi raises on purpose."""


class InputError(DadviError, ValueError):
    """Bad input or usage, refused at the door (exit code 2 of the command line)."""


class DataError(InputError):
    """A data set, a field of it or a source table that cannot be used."""


class ModelError(InputError):
    """A model that cannot be fitted as written, or that does not go with the data."""


class ClusterError(InputError):
    """A scheduler or worker that cannot be used: unreachable, empty, or with other software."""


class ShuffleWarning(UserWarning):
    """The data's chunks differ by more than chance allows, so that samples of them mislead."""


class WorkError(DadviError):
    """A task that failed where it ran; the message names the pass, shard and chunk."""
