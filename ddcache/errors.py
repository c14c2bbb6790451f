"""The exception tree. Everything that is the user's to mend derives from `DdcacheError`.

The command line prints such an error as one message and leaves with its `exit_code`;
any other exception is a defect of ddcache and keeps its traceback.
"""

from __future__ import annotations


class DdcacheError(Exception):
    """Work that could not be done, with a message that says what to do next."""

    exit_code = 1


class ConfigError(DdcacheError):
    """A pipeline file, option or argument that is wrong; nothing has been started."""

    exit_code = 2


class SourceError(DdcacheError):
    """A data source that is missing, inconsistent or cannot be read."""


class TeacherError(DdcacheError):
    """A teacher that raised, or whose output cannot be kept as the taps ask."""


class CacheError(DdcacheError):
    """A cache that is missing, damaged, incomplete, in use, or of another format."""


class StaleCacheError(CacheError):
    """A cache whose fingerprint differs from what it is asked to serve."""


class TrainError(DdcacheError):
    """A training run that cannot go on."""
