"""How our peers stand in a comparison of whole models, against the bars of the problem."""

from __future__ import annotations

from benchmarks.whole_models import Problem, Row

#: A peer may be so many times as far from the truth as the first that runs; FlexAttention's rule.
TOLERANCE = 1.1


def verdict(problem: Problem, rows: list[Row]) -> Row:
    """How our peers stand: speed-ups, and whether they are as close to the truth as others.

    Args:
        problem: with its peers and bars.
        rows: what is known of these.
    """
    own = {peer.name for peer in problem.peers if peer.ours}
    limits = {peer.name for peer in problem.peers if peer.limit}
    others = [row for row in rows if row["peer"] not in own | limits]
    found: Row = {"model": problem.name, "bars": list(problem.bars)}
    for row in rows:
        if row["peer"] in limits:
            found["limits"] = _speedups(row, others)
        elif row["peer"] in own:
            found[row["peer"]] = _judged(row, others, problem.bars)
    return found


def _judged(row: Row, others: list[Row], bars: tuple[float, float]) -> Row:
    mine = _speedups(row, others)
    reached = [value >= bars[0 if name.endswith("best") else 1] for name, value in mine.items()]
    exact = _is_exact(row, others)
    return mine | {"exact": exact, "met": bool(reached) and all(reached) and exact is not False}


def _speedups(row: Row, others: list[Row]) -> Row:
    """How much faster a peer is than the fastest of others, and than the first of them."""
    mine: Row = {}
    for what in ("forward", "step"):
        time_of = f"{what}_ms"
        if time_of not in row:
            continue
        known = [other[time_of] for other in others if time_of in other]
        if known:
            mine[f"{what}_over_best"] = round(min(known) / row[time_of], 3)
        if others and time_of in others[0]:
            mine[f"{what}_over_first"] = round(others[0][time_of] / row[time_of], 3)
    return mine


def _is_exact(row: Row, others: list[Row]) -> bool | None:
    """Whether errors are at most those of the yardstick, a little more; None if not known."""
    judged: list[bool] = []
    for what in ("forward_error", "gradient_error"):
        known = [other[what] for other in others if what in other]
        if what in row and known:
            judged.append(row[what] <= TOLERANCE * known[0] + 1e-5)
    return all(judged) if judged else None
