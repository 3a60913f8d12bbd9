"""The memory budget M of Eq. (2): how it is written, and how many floats it is of a network."""

import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator


def budget_floats(budget: str, model_floats: int) -> int:
    """M in floats of four bytes: floor(share × model size), or the given number (§3.2).

    Raises ValueError for a text that is neither a share (0.2%) nor a number of floats (31814) or bytes (127256B).
    """
    text = budget.strip()
    if match := re.fullmatch(r"(\d+)(?:\.(\d+))?\s*%", text):
        whole, decimals = match[1], match[2] or ""
        # integers, because 0.2 / 100 * 15,907,139 in floating point may fall on the wrong side of a whole number
        share, scale = int(whole + decimals), int(100 * 10 ** len(decimals))
        if share > scale:
            raise ValueError(f"the budget {budget!r} is more than the whole network: expected at most 100%")
        return model_floats * share // scale
    if match := re.fullmatch(r"(\d+)(\s*B)?", text):
        return int(match[1]) // (4 if match[2] else 1)
    raise ValueError(
        f"the budget {budget!r} is not understood: expected a share such as 0.2%, a number of floats such as 31814 or of "
        "bytes such as 127256B"
    )


def _text(budget: object) -> object:
    """YAML reads a number of floats without quotes as an integer."""
    return str(budget) if isinstance(budget, int) and not isinstance(budget, bool) else budget


def _readable(budget: str) -> str:
    budget_floats(budget, 1)
    return budget


Budget = Annotated[str, BeforeValidator(_text), AfterValidator(_readable)]
