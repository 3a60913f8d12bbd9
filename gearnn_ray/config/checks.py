"""What all parts of a configuration share: their base class, and checks of lists and level names."""

from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict

from gearnn_ray.levels.level import parse_level

ItemT = TypeVar("ItemT", str, float)


class Section(BaseModel):
    """One part of a configuration: frozen, without unknown options, every number finite."""

    # defaults too, or a number would be 0 where it is not given and 0.0 where a manifest gives it: another stage key
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


def each_once(what: str, values: tuple[ItemT, ...]) -> tuple[ItemT, ...]:
    """Return the values. Raises ValueError where one is given twice."""
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise ValueError(f"the {what} {twice} is given twice: give each {what} once")
    return values


def grid(what: str, values: tuple[float, ...]) -> tuple[float, ...]:
    """Return the values. Raises ValueError where there are none, one is not above 0, or one is given twice."""
    if not values:
        raise ValueError(f"no {what} is given: expected at least one, above 0")
    if min(values) <= 0:
        raise ValueError(f"the {what} {min(values):g} is given: expected above 0")
    return each_once(what, values)


def known_levels(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names. Raises UserError or ValueError where one is no level or is given twice."""
    for name in names:
        parse_level(name)
    return each_once("level", names)


LevelNames = Annotated[tuple[str, ...], AfterValidator(known_levels)]
