"""What can go wrong on the user's side, said in one plain sentence.

A job prints `str(error)` and exits 2: no traceback, nothing half done. Bugs of ours are any other exception.
"""


class UserError(Exception):
    """Something we were told is wrong: what was found, what was expected, what to do. One plain sentence."""


class CorruptStoreError(UserError):
    """What a store holds is not what its digest promises; the sentence names the digest."""


class TrainingFailedError(Exception):
    """A fine-tune cannot go on (a loss that is not finite, say); fails its level, not the others."""
