"""Ada-KV: the KV heads of a layer share its budget by the scores of a prompt's tokens (arXiv 2407.11550)."""

from __future__ import annotations

import torch

#: Of an even share, what each head keeps at least (the paper's safeguard).
FLOOR = 0.2


def shared(scores: torch.Tensor, budget: int, least: int, cap: int) -> list[int]:
    """Budgets of heads, of `heads * budget` tokens together.

    Every head has its own best tokens up to the floor; for the rest, tokens compete across heads by their scores
    (section 3.2, algorithm 1).

    Args:
        scores: of a prompt's tokens, `(heads, tokens)`; below 0 of those that the layer's own window has left behind.
        budget: tokens of each head if they shared evenly.
        least: the fewest tokens that the eviction method works with.
        cap: the most tokens that a head can hold.
    """
    heads, tokens = scores.shape
    if budget >= min(tokens, cap):  # nothing is evicted by now: there is nothing to compete for
        return [budget] * heads
    floor = min(max(int(FLOOR * budget), least), budget)
    # What a head's floor holds has won already, and what is out of sight never does.
    best = scores.topk(floor, dim=-1).indices
    rest = scores.scatter(1, best, -1.0).flatten()
    places = rest.topk(heads * (budget - floor)).indices
    won = torch.bincount(places[rest[places] >= 0] // tokens, minlength=heads)
    budgets = [min(floor + count, cap) for count in won.tolist()]
    while left := heads * budget - sum(budgets):  # of tokens out of sight, and above the cap: evenly to the others
        open_heads = [head for head, tokens in enumerate(budgets) if tokens < cap]
        for number, head in enumerate(open_heads):
            each = left // len(open_heads) + (number < left % len(open_heads))
            budgets[head] += min(each, cap - budgets[head])
    return budgets
