# SPDX-License-Identifier: Apache-2.0
"""One row of the table of changes."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from verl_dvpo.compat.versions import SUPPORTED


class Kind(str, Enum):
    """The way in which we touch a symbol of verl, vLLM or Ray."""

    #: Our function stands in its place and calls it.
    WRAP = "wrap"
    #: Ours stands in its place and does not call it.
    REPLACE = "replace"
    #: Ours is added to a registry, under a name that was free.
    REGISTER = "register"
    #: A class of ours derives from its class and redefines it.
    OVERRIDE = "override"
    #: Our code calls it with positional arguments, or relies on what it does inside.
    CALL = "call"


class Moment(str, Enum):
    """The time at which a change is put in place."""

    #: Right after the first import of the symbol's module, in every process.
    IMPORT = "import"
    #: While ``import verl`` runs, in every process.
    START = "start"
    #: When the CPU platform's agent loop worker starts, in its own process only.
    AGENT_LOOP_WORKER = "agent loop worker"
    #: When the CPU platform's rollout server starts, in its own process only.
    ROLLOUT_SERVER = "rollout server"
    #: Never by ``apply``: the class statement, the registration or the call is the change.
    NONE = "none"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tie to verl, vLLM or Ray.

    Attributes:
        symbol: theirs, ``module:qualified.name``; with ``members``, the class that has them.
        kind: the way in which we touch it.
        ours: our side, ``module:qualified.name`` or a module. What is applied is called with the original (wrap and
            replace) or with the symbol's module (register); a module alone is imported.
        what: the difference that our side makes.
        why: the reason, and why no extension point of theirs does.
        members: names in the class ``symbol``; each is a symbol of its own.
        relies_on: other symbols whose insides our side relies on.
        hands: functions of upper layers, by name, that ``ours`` gets after the original.
        after: the module whose first import is the moment; the symbol's own by default.
        moment: the time at which ``apply`` puts the change in place.
        platform: the value of ``VERL_PLATFORM`` with which it is applied; None for all.
        versions: versions of verl that have the symbols.
        upstream: the issue or pull request at theirs; empty where there is none.
    """

    symbol: str
    kind: Kind
    ours: str
    what: str
    why: str
    members: tuple[str, ...] = ()
    relies_on: tuple[str, ...] = ()
    hands: tuple[str, ...] = ()
    after: str = ""
    moment: Moment = Moment.NONE
    platform: str | None = None
    versions: tuple[str, ...] = tuple(SUPPORTED)
    upstream: str = ""

    @property
    def module(self) -> str:
        """The module of the symbol."""
        return self.symbol.partition(":")[0]

    @property
    def name(self) -> str:
        """The qualified name of the symbol within its module."""
        return self.symbol.partition(":")[2]

    def symbols(self) -> Iterator[str]:
        """Yields every symbol whose source has a fingerprint."""
        if self.members:
            yield from (f"{self.symbol}.{member}" for member in self.members)
        else:
            yield self.symbol
        yield from self.relies_on
