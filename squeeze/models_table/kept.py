"""Which positions a layer holds, as explicit lists: the eviction methods in plain words, without buffers or slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from squeeze.evictors import Evictor


class Kept:
    """The positions that one attention layer holds for one sequence.

    A method says which tokens may leave (`candidates`) and what each is worth (`worth`); those worth least leave. By
    itself it is a sliding window: any may leave, and the oldest does.

    Args:
        evictor: a built-in one.
        budget: tokens, or those of each KV head.
        kv_heads: of the layer's cache.
        window, chunk: of the layer's own attention, or None.
        index: of the layer in the cache.
    Attributes:
        held: for each KV head its positions, ascending.
        queries: of the prompt, `(query heads, tokens, dim)`, their scale, and what moves a key by so many positions,
            `(dim, dim)`, or None where nothing does; for methods that expect some.
        keys, values: of all tokens so far, `(kv_heads, tokens, dim)`.
        query_heads: that attend to the layer, once it was attended to.
    """

    #: Whether decode steps are looked at, too.
    watches = False

    def __init__(
        self,
        evictor: Any,
        budget: int | Sequence[int],
        kv_heads: int,
        window: int | None = None,
        chunk: int | None = None,
        index: int = 0,
    ):
        self.evictor, self.kv_heads, self.index = evictor, kv_heads, index
        self.budgets = [budget] * kv_heads if isinstance(budget, int) else list(budget)[:kv_heads]
        self.window, self.chunk = window, chunk
        self.held: list[list[int]] = []
        self.keys = self.values = self.queries = torch.empty(kv_heads, 0, 0)
        self.scale = 1.0
        self.move: Callable[[int], torch.Tensor | None] = lambda by: None
        self.query_heads = kv_heads

    def attended(self, probabilities: torch.Tensor) -> None:
        """Look at the probabilities of a forward pass, `(kv_heads, group, queries, tokens so far)`."""

    def candidates(self, head: int, positions: list[int]) -> list[int]:
        """Of ascending positions, the last one the newest token's, those that may leave."""
        return positions

    def worth(self, head: int, positions: list[int]) -> list[float]:
        """What positions are worth to a head that holds no others."""
        return list(map(float, positions))

    def first_seen(self, position: int) -> int:
        """The first token that the layer's own attention shows to the one at `position`."""
        if self.chunk is not None:
            return position // self.chunk * self.chunk
        return 0 if self.window is None else max(position - self.window + 1, 0)

    def beside_chosen(self, head: int, positions: list[int], first: int, end: int) -> list[int]:
        """Of positions of which one leaves for the last one, those that may, where `first` to `end` were chosen.

        What is out of sight; else what was chosen, unless later tokens fill half of the budget; else these.
        """
        if hidden := [one for one in positions if one < self.first_seen(positions[-1])]:
            return hidden
        chosen = [one for one in positions if first <= one < end]
        later = [one for one in positions[:-1] if one >= end]
        return later if len(later) >= self.budgets[head] // 2 or not chosen else chosen

    def prefill(self, tokens: int) -> None:
        """Keep what a prompt of so many tokens leaves."""
        self.held = [self._without(head, list(range(tokens)), self.budgets[head]) for head in range(self.kv_heads)]

    def admit(self, position: int) -> None:
        """Hold the token at `position`, for which a head that is full evicts one first."""
        for head, held in enumerate(self.held):
            self.held[head] = [*self._without(head, held, self.budgets[head] - 1, position), position]

    def _without(self, head: int, positions: list[int], count: int, new: int | None = None) -> list[int]:
        """The `count` of some positions that stay, ascending; `new` is on its way in."""
        arriving = [] if new is None else [new]
        may_leave = [one for one in self.candidates(head, positions + arriving) if one != new]
        first = self.first_seen(positions[-1] + 1 if new is None else new)
        worth = dict(zip(positions, self.worth(head, positions), strict=True))
        leaving = sorted(may_leave, key=lambda position: (position >= first, worth[position]))
        gone = set(leaving[: max(len(positions) - count, 0)])
        return [position for position in positions if position not in gone]


class Sinks(Kept):
    """StreamingLLM: the oldest leaves but for the first ones."""

    def candidates(self, head: int, positions: list[int]) -> list[int]:
        return positions[self.evictor.sinks :]

    def first_seen(self, position: int) -> int:
        return 0  # the oldest leave anyhow, and sinks stay


class HeavyHitters(Kept):
    """H2O: of all but the most recent half of a budget, what has gathered least attention leaves."""

    watches = True

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.gathered = torch.empty(self.kv_heads, 0)

    def attended(self, probabilities: torch.Tensor) -> None:
        found = probabilities.sum(dim=(1, 2))
        self.gathered = torch.nn.functional.pad(self.gathered, (0, found.shape[1] - self.gathered.shape[1])) + found

    def candidates(self, head: int, positions: list[int]) -> list[int]:
        return positions[: len(positions) - self.budgets[head] // 2]

    def worth(self, head: int, positions: list[int]) -> list[float]:
        return self.gathered[head, positions].tolist()


class Votes(Kept):
    """SnapKV: before the window, what its queries gave least attention leaves; then the oldest of later ones."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.votes = torch.empty(self.kv_heads, 0)

    def attended(self, probabilities: torch.Tensor) -> None:
        window, reach = self.evictor.window, self.evictor.kernel // 2
        found = probabilities[:, :, -window:].sum(dim=(1, 2))
        before = max(found.shape[1] - window, 0)
        self.votes = torch.zeros_like(found)
        for position in range(before):
            near = [
                found[:, other] if 0 <= other < before else torch.zeros(self.kv_heads)
                for other in range(position - reach, position + reach + 1)
            ]
            self.votes[:, position] = torch.stack(near).mean(dim=0)

    def candidates(self, head: int, positions: list[int]) -> list[int]:
        if positions[-1] < self.votes.shape[1]:
            return positions[: max(len(positions) - self.evictor.window, 0)]
        return self.beside_chosen(head, positions, 0, self.votes.shape[1] - self.evictor.window)

    def worth(self, head: int, positions: list[int]) -> list[float]:
        voted = self.votes.shape[1] - self.evictor.window  # tokens that can be
        return [self.votes[head, one].item() if one < voted else float(one) for one in positions]


class Expected(Kept):
    """Expected Attention: of the prompt what queries to come would give least leaves; then the oldest generated."""

    def prefill(self, tokens: int) -> None:
        self.prompt, self.scores = tokens, [self._scores(head, tokens) for head in range(self.kv_heads)]
        super().prefill(tokens)

    def _scores(self, head: int, tokens: int) -> list[float]:
        """What is expected for each token, times the length of its value."""
        skipped = min(self.evictor.first, tokens - 1)
        keys, total = self.keys[head, skipped:], torch.zeros(tokens)
        for queries in self.queries.unflatten(0, (self.kv_heads, -1))[head]:
            own = torch.stack([queries[one] @ torch.linalg.inv(self._turn(one)) for one in range(skipped, tokens)])
            mean, spread = own.mean(dim=0), torch.cov(own.T, correction=0)
            turns = [self._turn(tokens + one) for one in range(self.evictor.future)]
            turn = torch.stack(turns).mean(dim=0)
            mean, spread = mean @ turn, turn.T @ spread @ turn
            logits = [self.scale * mean @ key + self.scale**2 / 2 * key @ spread @ key for key in keys]
            total[skipped:] += torch.stack(logits).softmax(dim=0)
        return (total * self.values[head].norm(dim=-1)).tolist()

    def _turn(self, by: int) -> torch.Tensor:
        move = self.move(by) if by else None
        return torch.eye(self.keys.shape[-1]) if move is None else move

    def candidates(self, head: int, positions: list[int]) -> list[int]:
        return self.beside_chosen(head, positions, self.evictor.first, self.prompt) if self.held else positions

    def worth(self, head: int, positions: list[int]) -> list[float]:
        of_prompt = [float("inf")] * self.evictor.first + self.scores[head][self.evictor.first :]
        return [of_prompt[one] if one < self.prompt else float(one) for one in positions]


class Newest(Kept):
    """TOVA: what the newest query gave least attention leaves, its heads taken together."""

    watches = True

    def attended(self, probabilities: torch.Tensor) -> None:
        self.given = probabilities[:, :, -1].mean(dim=(0, 1))

    def worth(self, head: int, positions: list[int]) -> list[float]:
        return self.given[positions].tolist()


class Short(Kept):
    """The longest key leaves."""

    def worth(self, head: int, positions: list[int]) -> list[float]:
        return [-self.keys[head, one].norm().item() for one in positions]


class Different(Kept):
    """KeyDiff: the key leaves that is most like the mean direction of those that are held."""

    def worth(self, head: int, positions: list[int]) -> list[float]:
        directions = self.keys[head, positions]
        directions = directions / directions.norm(dim=-1, keepdim=True)
        mean = directions.mean(dim=0)
        return (-directions @ (mean / mean.norm())).tolist()


class Lags(Kept):
    """LagKV: of a prompt's parts, what varies least beside the next part leaves; then the oldest of later ones."""

    def prefill(self, tokens: int) -> None:
        lag, first = self.evictor.lag, self.evictor.first
        self.end = first + max((tokens - first) // lag - 1, 0) * lag
        self.ranks = [self._ranks(head) for head in range(self.kv_heads)]
        super().prefill(tokens)

    def _ranks(self, head: int) -> list[tuple[int, int]]:
        """Of each token before `end`: its place in its part, from that which varies least, and its position."""
        lag, first = self.evictor.lag, self.evictor.first
        ranks = [(lag, position) for position in range(first)]
        for start in range(first, self.end, lag):
            varying = torch.zeros(lag)
            for states in (self.keys[head], self.values[head]):
                own, following = states[start : start + lag], states[start + lag : start + 2 * lag]
                low, high = following.min(dim=0).values, following.max(dim=0).values
                varying += ((own - low) / (high - low)).std(dim=1).softmax(dim=0)
            for token in range(lag):
                ranks.append((int((varying < varying[token]).sum()), start + token))
        return ranks

    def candidates(self, head: int, positions: list[int]) -> list[int]:
        first = self.evictor.first
        return self.beside_chosen(head, positions, first, max(self.end, first)) if self.held else positions

    def worth(self, head: int, positions: list[int]) -> list[float]:
        """Those that are ranked by their ranks, recent ones above them by their age, the first above all."""
        first, last = self.evictor.first, positions[-1]
        in_order = sorted(self.ranks[head][first:])
        place = {position: float(index) for index, (_, position) in enumerate(in_order)}
        recent = {position: len(place) + 1.0 + position for position in range(self.end, last + 1)}
        return [float("inf") if one < first else (place | recent)[one] for one in positions]


class Lots(Kept):
    """Random: each token of each head has drawn a lot, and the lowest leaves."""

    def worth(self, head: int, positions: list[int]) -> list[float]:
        return [
            split_mix(one + 1 + ((self.index << 16) + head + 1) * (1 << 40), self.evictor.seed) for one in positions
        ]


def split_mix(state: int, seed: int) -> float:
    """SplitMix64's output for a state, its highest 24 bits as a number below 1."""
    whole = (1 << 64) - 1
    state = (state + seed * 0x632BE59BD9B4E019) * 0x9E3779B97F4A7C15 & whole
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & whole
    state = (state ^ state >> 27) * 0x94D049BB133111EB & whole
    return (state >> 40) / (1 << 24)


METHODS: dict[str, type[Kept]] = {
    "sliding_window": Kept,
    "streaming": Sinks,
    "h2o": HeavyHitters,
    "snapkv": Votes,
    "tova": Newest,
    "expected_attention": Expected,
    "knorm": Short,
    "keydiff": Different,
    "lagkv": Lags,
    "random": Lots,
}


def kept(evictor: Evictor, *args: Any) -> Kept:
    """What a layer holds under a method; the other arguments are those of `Kept`."""
    return METHODS[evictor.name](evictor, *args)
