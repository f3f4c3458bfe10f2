"""When a scorer is evaluated on its way."""

from __future__ import annotations


def evaluation_steps(total_steps: int, evaluations: int) -> tuple[int, ...]:
    """The optimizer steps (counted from 1) after which the held-out pairs are scored.

    Exactly `evaluations` distinct steps, evenly spaced, the last one `total_steps`.

    Raises:
        ValueError: fewer steps than evaluations, or not positive.
    """
    if evaluations < 1 or total_steps < evaluations:
        raise ValueError(f"{total_steps} optimizer steps have no room for {evaluations} evaluations")
    # Integer arithmetic, rounding half up: neighbours differ by at least floor(total / evaluations) >= 1.
    return tuple(
        (2 * total_steps * number + evaluations) // (2 * evaluations) for number in range(1, evaluations + 1)
    )
