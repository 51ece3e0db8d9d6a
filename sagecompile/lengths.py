"""Ask the lengths that are symbols, once for all sites of a graph: each answer is a guard, and may cost another graph.

In: the sites of a graph with what `decide` says of each. Out: the same, with Keep where a length is below the crossing,
the shortest from which on a kernel wins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from .decide import Decision, Keep, Use
from .site import AttentionSite, Size

Reaches = Callable[[Size, int], bool | None]
"""(symbolic length, tokens) to whether it has as many, which may add a guard; None where none may be added."""


def long_enough(decided: Sequence[tuple[AttentionSite, Decision]], reaches: Reaches) -> list[Decision]:
    """The decisions for all sites of a graph, of which those stay Use whose lengths reach the crossing.

    All sites of the same lengths share one, the largest of theirs: so a model that sees every length compiles one graph
    more, however many kinds of attention it has. Lengths that are numbers go first, and add nothing.
    """
    decided = [(site, _by_numbers(site, decision)) for site, decision in decided]
    crossings: dict[frozenset[str], int] = {}
    for site, decision in decided:
        crossings[_names(site)] = max(_at_least(decision), crossings.get(_names(site), 0))
    answers: dict[frozenset[str], bool | None] = {}

    def judged(site: AttentionSite, decision: Decision) -> Decision:
        if isinstance(decision, Keep) or not _at_least(decision):
            return decision
        names, crossing = _names(site), crossings[_names(site)]
        if names not in answers:
            asked = (reaches(length, crossing) for length in _symbols(site).values())
            answers[names] = next((answer for answer in asked if not answer), True)
        if answers[names] is None:
            return Keep(f"range begins below {crossing} tokens: mark_dynamic with min={crossing}, or without a range")
        return _from(decision, crossing) if answers[names] else _too_short(decision, crossing)

    return [judged(site, decision) for site, decision in decided]


def _by_numbers(site: AttentionSite, decision: Decision) -> Decision:
    numbers = (length for length in (site.q_len, site.kv_len) if isinstance(length, int))
    if isinstance(decision, Use) and any(length < _at_least(decision) for length in numbers):
        return _too_short(decision, _at_least(decision))
    return decision


def _symbols(site: AttentionSite) -> dict[str, Size]:
    return {str(length): length for length in (site.q_len, site.kv_len) if not isinstance(length, int)}


def _names(site: AttentionSite) -> frozenset[str]:
    return frozenset(_symbols(site))


def _at_least(decision: Decision) -> int:
    """Tokens of queries and of keys that it takes, where their number is a symbol."""
    return decision.prediction.at_least if isinstance(decision, Use) and decision.prediction else 0


def _too_short(use: Use, crossing: int) -> Keep:
    wins = f"{use.format} by {use.provider} wins from"
    others = "there on" if crossing == _at_least(use) else f"{_at_least(use)} on, all of this length from there"
    return Keep(f"fewer than {crossing} tokens: {wins} {others}")


def _from(use: Use, crossing: int) -> Use:
    """With what it goes by, where others of the same lengths win later."""
    if use.prediction is None or crossing == _at_least(use):
        return use
    basis = f"{use.prediction.basis}; all of this length from {crossing} on"
    return replace(use, prediction=replace(use.prediction, basis=basis, at_least=crossing))
