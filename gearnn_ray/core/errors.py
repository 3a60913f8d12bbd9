"""Errors that a user can cause or repair: a job prints `str(error)`, one plain sentence, and exits 2 without a traceback."""


class UserError(Exception):
    """Invalid input. The message is one sentence: what was found, what was expected, what to do."""


class CorruptStoreError(UserError):
    """Data in a store does not match its digest; the message names the digest."""


class TrainingFailedError(Exception):
    """A fine-tune cannot continue, for example because its loss is not finite. Only its own level fails."""
