"""What a model is put through, for each eviction method, and what the table says of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from squeeze import H2O, Allocation, Explicit, InputError, SlidingWindow, Squeeze, StreamingLLM, Uniform, squeezed
from squeeze.compatibility import cache_argument
from squeeze.engine.findings import AttentionLayer
from squeeze.evictors import Evictor
from squeeze.models_table.reference import Reference

EVICTORS: tuple[Evictor, ...] = (SlidingWindow(), H2O(), StreamingLLM())
#: Tokens of the two prompts, which are left-padded to a batch; and how many are decoded after them.
LENGTHS = (41, 29)
STEPS = 32
#: Of log-probabilities, and of logits as a part of the largest, in float32.
TOLERANCE = 1e-3
UNIFORM, SQUEEZE = Uniform(Fraction("0.3")), Squeeze(Fraction("0.4"), class3=Fraction("0.2"))


class Differs(Exception):
    """A model with a squeezed cache does not compute what it should; the message is one sentence."""


@dataclass(frozen=True)
class Verdict:
    """What came of a check.

    Attributes:
        cell: `ok`; `–` where the model cannot be put through it; `WRONG`.
        reason: one sentence, of those that are not ok.
    """

    cell: str = "ok"
    reason: str | None = None


def verdict(check: Callable[..., None], *arguments: Any) -> Verdict:
    """What comes of a check."""
    try:
        check(*arguments)
    except InputError as error:
        return Verdict("–", str(error))
    except Differs as error:
        return Verdict("WRONG", str(error))
    except Exception as error:  # whatever a model's own code raises is the finding
        return Verdict("WRONG", f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
    return Verdict()


@dataclass(frozen=True)
class Batch:
    """Two random prompts, left-padded, and what is decoded after them.

    Attributes:
        ids, mask: `(2, columns)`, token ids and which of them are no padding.
        answer: `(2, steps)`.
        lengths: tokens of each prompt.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    answer: torch.Tensor
    lengths: tuple[int, int]

    @classmethod
    def of(cls, model: PreTrainedModel, lengths: tuple[int, int], steps: int) -> Batch:
        generator = torch.Generator().manual_seed(1)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        # Each token once: of the same one twice the first layer's keys are of one length, and which leaves is chance.
        tokens = torch.rand(2, vocabulary - 3, generator=generator).argsort(dim=1)[:, : max(lengths) + steps] + 3
        ids, answer = tokens.split((max(lengths), steps), dim=1)
        mask = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
        return cls(ids * mask, mask, answer, lengths)

    def prompt(self, row: int) -> torch.Tensor:
        """A row without padding, `(tokens,)`."""
        return self.ids[row, -self.lengths[row] :]

    @torch.no_grad()
    def logits(self, model: PreTrainedModel, cache: Cache) -> torch.Tensor:
        """Logits of the prompt's columns, padding at 0, and of every step, `(2, columns + steps, vocabulary)`.

        The model is called as `generate` calls it.
        """
        positional = "position_ids" in inspect.signature(type(model).forward).parameters
        mask, parts = self.mask, []
        for step in range(self.answer.shape[1] + 1):
            tokens = self.answer[:, step - 1 : step] if step else self.ids
            if step:
                mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
            given = {"input_ids": tokens, "attention_mask": mask, cache_argument(): cache, "use_cache": True}
            if positional:
                given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            parts.append(model(**given).logits * mask[:, -tokens.shape[1] :, None])
        return torch.cat(parts, dim=1)

    def generated(self, model: PreTrainedModel) -> torch.Tensor:
        """What the model generates by itself, greedily, after the prompts."""
        new = self.answer.shape[1] + 1
        return model.generate(self.ids, attention_mask=self.mask, max_new_tokens=new, do_sample=False)


def check_method(model: PreTrainedModel, reference: Reference, evictor: Evictor, steps: int = STEPS) -> None:
    """Full budgets; and less, alike in all layers, by chance in every head, and by the model's own similarities.

    Raises:
        InputError: the method cannot be used with the model.
        Differs: it computes something else than it should.
    """
    layers = reference.layers
    check_full(model, layers, evictor)
    check_budgets(model, reference, evictor, UNIFORM, steps)
    check_budgets(model, reference, evictor, seeded(layers, evictor), steps)
    if all(layer.residual is not None for layer in layers):
        check_budgets(model, reference, evictor, SQUEEZE, steps)


def check_full(model: PreTrainedModel, layers: Sequence[AttentionLayer], evictor: Evictor) -> None:
    """With room for every token, logits and generated tokens are the unpatched model's.

    StreamingLLM must not fill a layer that has a window: its sinks stay, where the model's own cache lets go of them.
    """
    narrowest = min([t for layer in layers for t in (layer.window, layer.chunk) if t], default=sum(LENGTHS))
    short = evictor.sinks > 0 and narrowest < max(LENGTHS) + 9
    lengths, steps = ((narrowest // 2, narrowest // 2 - 1), narrowest // 2) if short else (LENGTHS, 9)
    batch = Batch.of(model, lengths, steps)
    want, tokens = batch.logits(model, own_cache(model)), batch.generated(model)
    with squeezed(model, evictor, Explicit([10_000] * len(layers))) as run:
        got = batch.logits(model, run.cache(batch.answer.shape[1]))
        same = torch.equal(batch.generated(model), tokens)
    differ("with full budgets, logits", got, want, want.abs().max().item())
    if not same:
        raise Differs("with full budgets, generate gives other tokens")


def check_budgets(
    model: PreTrainedModel, reference: Reference, evictor: Evictor, allocation: Allocation, steps: int
) -> None:
    """With less room, log-probabilities are the reference's, at every step and in every row."""
    batch = Batch.of(model, LENGTHS, steps)
    with squeezed(model, evictor, allocation) as run:
        got = batch.logits(model, run.cache(steps))[:, max(LENGTHS) - 1 :].float().log_softmax(-1)
        budgets = run.budgets.tolist()
    for row in range(2):
        want = reference(evictor, budgets[row], batch.prompt(row), batch.answer[row])
        differ(f"with budgets {budgets[row]}, log-probabilities", got[row], want)


def check_chunks(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> None:
    """A prefill in chunks, of which nothing is lost, gives what a whole one gives."""
    batch, logits = Batch.of(model, LENGTHS, STEPS), []
    for size in (None, 16):
        with squeezed(model, SlidingWindow(), Explicit([31] * len(layers)), prefill_chunk=size) as run:
            logits.append(batch.logits(model, run.cache(STEPS)))
    differ("after a prefill in chunks, logits", logits[1], logits[0], logits[0].abs().max().item())


def check_importance(model: PreTrainedModel) -> None:
    """Importance of prompts in a padded batch is that of each alone."""
    batch = Batch.of(model, LENGTHS, 1)
    with squeezed(model, SlidingWindow(), SQUEEZE) as run:
        batch.generated(model)
        together = torch.as_tensor(run.similarities)
        for row in range(2):
            model.generate(batch.prompt(row)[None], max_new_tokens=2, do_sample=False)
            differ("similarities in a padded batch", together[row], torch.as_tensor(run.similarities[0]))


def differ(what: str, got: torch.Tensor, want: torch.Tensor, scale: float = 1.0) -> None:
    """Raises Differs where two results are not the same up to rounding, as parts of `scale`."""
    error = (got - want).abs().max().item() / scale
    if not error <= TOLERANCE:
        raise Differs(f"{what} differ by {error:.2g}")


def own_cache(model: PreTrainedModel) -> DynamicCache:
    """The cache that the model would make for itself."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def seeded(layers: Sequence[AttentionLayer], evictor: Evictor) -> Explicit:
    """Budgets by chance, from the fewest tokens that the method works with up to what does not fill every prompt.

    Every KV head has its own, where attention does not mix them and the method does not have them agree.
    """
    generator = torch.Generator().manual_seed(2)
    most = max(layer.kv_heads for layer in layers)
    drawn = torch.randint(evictor.minimum_budget, 34, (len(layers), most), generator=generator).tolist()
    if evictor.heads_agree or any(layer.regrouped for layer in layers):
        return Explicit([own[0] for own in drawn])
    return Explicit([own[: layer.kv_heads] for own, layer in zip(drawn, layers, strict=True)])
