"""The settings of one compilation.

In: `options={"sage.policy": ...}` of torch.compile and the environment (`SAGECOMPILE_POLICY`, ...). Out: one frozen
`Settings`, and the options without our prefix, which are Inductor's. An unknown name is an error that lists the known.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from .errors import OptionError
from .formats import FORMATS

POLICIES = ("auto", "always", "never")
SWITCH = {"true": True, "1": True, "false": False, "0": False}
OPTION_PREFIX = "sage."
ENVIRONMENT_PREFIX = "SAGECOMPILE_"


@dataclass(frozen=True)
class Settings:
    """What the user asked for."""

    policy: str = "auto"
    """`auto` rewrites where a win is predicted, `always` wherever it is legal, `never` nowhere."""
    formats: tuple[str, ...] = tuple(FORMATS)
    """The formats that may be used; `always` takes the first legal one."""
    min_speedup: float = 1.05
    """The predicted speed-up over SDPA that `auto` asks for."""
    measure: bool = True
    """Whether `auto` measures while compiling what it has no measurement of."""
    cuda_graphs: bool = False
    """Whether the caller captures what torch.compile returns in a CUDA graph, where launches cost nothing.

    That Inductor does (`mode="reduce-overhead"`) need not be said; to vLLM it is nothing.
    """

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise OptionError(f"sage.policy is {self.policy!r}; it can be {', '.join(POLICIES)}")
        if not self.formats:
            raise OptionError(f"sage.formats is empty; name at least one of {', '.join(FORMATS)}")
        for name in self.formats:
            if name not in FORMATS:
                raise OptionError(f"sage.formats has {name!r}; known formats are {', '.join(FORMATS)}")
        if not 0 < self.min_speedup < math.inf:
            raise OptionError(f"sage.min_speedup is {self.min_speedup}; it is a ratio above 0, such as 1.05")

    def updated(self, values: Mapping[str, Any], named: str) -> Settings:
        """These settings with `values` (field name to value, text allowed) put in; `named` prefixes names in errors."""
        known = [field.name for field in fields(self)]
        changes = {}
        for name, value in values.items():
            if name not in known:
                raise OptionError(f"unknown option {named}{name}; known are {', '.join(named + k for k in known)}")
            changes[name] = _parse(name, value)
        return replace(self, **changes)


def _parse(name: str, value: Any) -> Any:
    if name == "formats":
        names = value.split(",") if isinstance(value, str) else value
        if not isinstance(names, Iterable):
            raise OptionError(f"sage.formats is {value!r}; it is a list or text such as {','.join(FORMATS)}")
        return tuple(str(item).strip() for item in names)
    if name == "min_speedup":
        try:
            if isinstance(value, bool):
                raise TypeError
            return float(value)
        except (TypeError, ValueError):
            raise OptionError(f"sage.min_speedup is {value!r}; it is a number such as 1.05") from None
    if name == "policy" and isinstance(value, str):
        return value.lower()
    if name in ("measure", "cuda_graphs"):
        if str(value).lower() not in SWITCH:
            raise OptionError(f"sage.{name} is {value!r}; it can be {', '.join(SWITCH)}")
        return SWITCH[str(value).lower()]
    return value


def from_environment(environ: Mapping[str, str] = os.environ) -> Settings:
    """The defaults with every `SAGECOMPILE_*` variable applied. Raises OptionError for one that is not ours."""
    values = {
        name[len(ENVIRONMENT_PREFIX) :].lower(): value
        for name, value in environ.items()
        if name.startswith(ENVIRONMENT_PREFIX) and value  # an empty one is as none
    }
    names = ", ".join(ENVIRONMENT_PREFIX + field.name.upper() for field in fields(Settings))
    for name in values:
        if name not in Settings.__dataclass_fields__:
            raise OptionError(
                f"unknown variable {ENVIRONMENT_PREFIX}{name.upper()} in the environment; known are {names}"
            )
    try:
        return Settings().updated(values, "")
    except OptionError as error:
        raise OptionError(f"{error} (from the environment, where the names are {names})") from None


def resolve(options: Mapping[str, Any] | None) -> tuple[Settings, dict[str, Any]]:
    """Split torch.compile's options into our settings (over the environment's) and Inductor's options, untouched."""
    ours, inductors = {}, {}
    for name, value in (options or {}).items():
        if not isinstance(name, str):
            raise OptionError(f"option {name!r}: names are text, such as {OPTION_PREFIX}policy")
        plain = name.removeprefix("sage").lstrip("._-")
        if name.startswith(OPTION_PREFIX):
            ours[name[len(OPTION_PREFIX) :]] = value
        elif plain in Settings.__dataclass_fields__:  # Inductor has no option of these names
            raise OptionError(f"unknown option {name}; write {OPTION_PREFIX}{plain}")
        else:
            inductors[name] = value
    return from_environment().updated(ours, OPTION_PREFIX), inductors
