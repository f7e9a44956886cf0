"""What can go wrong by a user's doing. Every class is also the nearest standard-library error, and picklable (Ray needs
it).
"""


class RlrouteError(Exception):
    """Base of all errors that rlroute raises on purpose; the command line prints them as one line and exits with 2."""


class ConfigError(RlrouteError, ValueError):
    """Raised when a configuration holds an unknown field, an illegal value, or an unknown router."""


class DecisionError(RlrouteError, ValueError):
    """Raised when a routing decision breaks its contract: shapes, dtypes, ids out of range, non-finite gates."""


class DataError(RlrouteError, ValueError):
    """Raised when a corpus cannot be found, read or is too short for what was asked."""


class StoreError(RlrouteError, OSError):
    """Raised when a run store or one of its records cannot be read or written."""


class HeldError(StoreError):
    """Raised when another process trains the run that is asked for."""


class CheckpointError(RlrouteError, ValueError):
    """Raised when a checkpoint is damaged or belongs to another configuration."""


class ComparisonError(RlrouteError, ValueError):
    """Raised when runs that are to stand in one table are not comparable; the message names the field."""


class DefectError(RlrouteError, RuntimeError):
    """Raised in place of an error that is none of these: a defect in code, mostly a router's. It names the exception,
    file and line.
    """


class MissingDependencyError(RlrouteError, ImportError):
    """Raised when an optional package is needed for what was asked and is not installed."""
