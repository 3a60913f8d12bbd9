"""Errors that a user can cause or repair: a job prints `str(error)`, one plain sentence, and exits 2 without a traceback."""

import errno


class UserError(Exception):
    """Invalid input. The message is one sentence: what was found, what was expected, what to do."""


class CorruptStoreError(UserError):
    """Data in a store does not match its digest; the message names the digest."""


class StoreUnavailableError(UserError):
    """A store in the network did not answer for as long as its reader has patience (`store.patience`)."""


class TrainingFailedError(Exception):
    """A fine-tune cannot continue, for example because its loss is not finite. Only its own level fails."""


_TAKES_NOTHING = {
    errno.ENOSPC: "no space is left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
}


def storage_problem(error: BaseException) -> str | None:
    """The sentence, without a full stop, for a disk that is full or read-only; None for any other error."""
    if not isinstance(error, OSError) or (found := _TAKES_NOTHING.get(error.errno or 0)) is None:
        return None
    path = f": {error.filename} could not be written" if error.filename else ", and a file could not be written"
    advice = "Remount it, or name another place" if error.errno == errno.EROFS else "Make room"
    return f"{found}{path}. {advice}, and run the same command again"
