"""The few kinds of error that callers and files can cause.

Every message has three parts: what was asked, what is possible, what to change. A bug of our own
is an assertion, not one of these.
"""


class AlphaQuantError(Exception):
    """What the user's input, files or model caused; commands print one line and exit with 1."""


class FormatError(AlphaQuantError):
    """A number format that does not exist, or values that no format can hold (NaN, infinity)."""


class BudgetError(AlphaQuantError):
    """A budget that cannot be read or cannot be reached with the formats at hand."""


class ConfigError(AlphaQuantError):
    """A configuration file that is not valid; the message carries the JSON path."""


class ModelError(AlphaQuantError):
    """A model that cannot be found or quantized, or a matrix that calibration did not reach."""


class DataError(AlphaQuantError):
    """A text source that cannot be found or is too short."""


class StoreError(AlphaQuantError):
    """A bank, checkpoint, study or folder that is damaged, of another run, or in the way."""
