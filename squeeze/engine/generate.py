"""Stand-ins for methods of `GenerationMixin`: `generate` gets a SqueezeCache, or says why it cannot."""

from __future__ import annotations

from typing import Any, NoReturn

from transformers.generation import GenerationMode

from squeeze.compatibility import cache_argument
from squeeze.engine.cache import SqueezeCache
from squeeze.engine.squeezed_model import SqueezedModel


def prepare_cache(run: SqueezedModel, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length):
    """Stands in for `_prepare_cache_for_generation`.

    Raises:
        ValueError: what is asked for cannot be done on a squeezed cache.
    """
    cache = model_kwargs.get(cache_argument())
    if cache is not None and not isinstance(cache, SqueezeCache):
        original = type(run.model)._prepare_cache_for_generation
        return original(run.model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
    if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"{generation_mode.value.replace('_', ' ')} is not supported with a squeezed cache: "
            "use greedy decoding or sampling"
        )
    for name in ("prefill_chunk_size", "cache_implementation"):
        if getattr(generation_config, name) is not None:
            raise ValueError(
                f"{name} cannot be combined with a squeezed cache, which takes the prompt in one piece, or in the "
                "chunks of SqueezeConfig(prefill_chunk=...)"
            )
    if generation_config.guidance_scale not in (None, 1):
        raise ValueError("guidance_scale reads every prompt a second time, on a cache of its own: leave it out")
    if generation_config.use_cache is False:
        raise ValueError(
            "use_cache is False, in the call or in model.generation_config, which leaves nothing to squeeze: "
            "set it to True, or generate outside of `with squeezed(...)`"
        )
    if cache is None:
        by_token = next(model_kwargs[name] for name in ("position_ids", "attention_mask") if name in model_kwargs)
        # max_cache_length is one less than prompt and new tokens: the last token is never fed back.
        model_kwargs[cache_argument()] = run.cache(max_cache_length + 1 - by_token.shape[-1])
    return None


def no_continuous_batching(*args: Any, **kwargs: Any) -> NoReturn:
    """Stands in for `init_continuous_batching`, by which `generate_batch` makes a paged cache of its own."""
    raise ValueError("continuous batching has a cache of its own: use model.generate inside `with squeezed(...)`")
