"""A decode step as one CUDA graph: recorded once, and launched as a whole from then on.

A step of a small model, or of a small batch, is thousands of short kernels, and a GPU waits for the CPU to launch
them. A graph is launched by one call. It does the same to the same memory every time, so what changes from step to
step must lie there: tokens and positions are copied to where the graph was recorded with them, and the cache counts
its own positions up in place.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_leaves
from transformers.utils import ModelOutput

from squeeze.engine.autocast import autocast_dtype
from squeeze.engine.cache import Held, SqueezeCache
from squeeze.engine.schedule import Schedule
from squeeze.errors import InputError
from squeeze.text import message_of


class Recording(Protocol):
    """What a device does in a step, to be done again."""

    def __init__(self, device: torch.device) -> None: ...

    @staticmethod
    def watched(step: Callable[[], Any]) -> tuple[Any, str | None]:
        """What `step` returns, which is done, and why it cannot be recorded, as far as that can be seen from it."""

    def record(self, step: Callable[[], Any]) -> Any:
        """What `step` returns, whose tensors are filled by `replay`; nothing of it is done."""

    def replay(self) -> None:
        """Have the device do it."""


class CudaGraph:
    """`torch.cuda.CUDAGraph`. While it is recorded, no other thread may call `torch.cuda.synchronize`."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.graph = device, torch.cuda.CUDAGraph()

    @staticmethod
    def watched(step: Callable[[], Any]) -> tuple[Any, str | None]:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                output = step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
        waits = []
        for one in said:
            if "synchronizing CUDA operation" in str(one.message):
                waits.append(f"{one.filename}:{one.lineno} waits for the GPU")
            else:
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        return output, next(iter(waits), None)

    def record(self, step: Callable[[], Any]) -> Any:
        with torch.cuda.device(self.device), warnings.catch_warnings():
            warnings.filterwarnings("error", message="The CUDA Graph is empty")
            stream, own = torch.cuda.current_stream(), torch.cuda.Stream()
            own.wait_stream(stream)
            with torch.cuda.stream(own):
                torch._C._cuda_clearCublasWorkspaces()  # a graph's own is gone with it
                with torch.inference_mode(False):
                    self.graph.capture_begin(capture_error_mode="thread_local")
                try:
                    output = step()
                except BaseException:
                    with suppress(Exception):  # which says no more than that something failed before
                        self.graph.capture_end()
                    raise
                self.graph.capture_end()
                torch._C._cuda_clearCublasWorkspaces()
            stream.wait_stream(own)
        return output

    def replay(self) -> None:
        self.graph.replay()


#: What records steps, by the kind of device.
RECORDINGS: dict[str, type[Recording]] = {"cuda": CudaGraph}


def check_device(device: torch.device) -> None:
    """Raises InputError where nothing can be recorded."""
    if device.type not in RECORDINGS:
        raise InputError(f"cuda_graph needs the model on an NVIDIA GPU, and it is on {device.type}: leave it out")


class Recorder:
    """Records the steps of a model's caches, until that has failed once.

    Attributes:
        failed: what did not work; None: nothing yet.
        recorded: how many recordings were made.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.failed: str | None = None
        self.recorded = 0
        self._kept: list[Recording] = []

    def watch(self, step: Callable[[], Any]) -> Any:
        """What `step` returns, which is done; says whether it can be recorded."""
        output, asks = RECORDINGS[self.device.type].watched(step)
        if asks is not None:
            self._fail(asks)
        return output

    def record(self, step: Callable[[], Any]) -> tuple[Recording, Any] | None:
        """A recording, and what `step` returns; None where there can be none."""
        recording = RECORDINGS[self.device.type](self.device)
        try:
            output = recording.record(step)
        except torch.OutOfMemoryError:  # which a smaller batch may not meet
            return None
        except Exception as error:  # whatever a kernel raises while it is recorded
            self._kept.append(recording)  # whose memory PyTorch may still write to
            self._fail(message_of(error))
            return None
        self.recorded += 1
        return recording, output

    def _fail(self, reason: str) -> None:
        self.failed = reason
        warnings.warn(f"decode steps go on without a CUDA graph, which could not be recorded: {reason}", stacklevel=2)


class GraphedStep:
    """The decode steps of one cache, whose attention looks at empty slots, too, so that shapes stay what they are.

    The first step of a kind is run kernel by kernel, which loads them and shows whether they wait for the host; the
    second one is recorded, and it and all that follow are replayed. Kinds are few: before and after the last row is
    full, and before and after a first token is evicted. The cache is not held here, which holds this: so its memory is
    free as soon as nobody else holds it.

    Attributes:
        kind: of the last step.
        recording: of steps of this kind; None before there is one.
        tried: whether one was to be made.
        inputs, output: the tensors that it reads, by their arguments' names, and what it fills.
        states: of the cache's schedules, which it counts up.
    """

    def __init__(self, recorder: Recorder):
        self.recorder = recorder
        self.kind: tuple[Any, ...] | None = None
        self._forget()

    @torch.no_grad()
    def __call__(self, cache: SqueezeCache, forward: Callable[..., ModelOutput], given: dict[str, Any]) -> ModelOutput:
        """The decoder's output over one more token of each sequence.

        Args:
            cache: always the same.
            forward: the decoder's own pass on it, which returns no tuple.
            given: its other arguments, positions among them, but no mask, which squeezed attention does not look at.
        """
        inputs = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        held = cache.held(len(inputs["input_ids" if "input_ids" in inputs else "inputs_embeds"]))

        def step() -> ModelOutput:
            cache.begin_step(held)
            return forward(**given)

        others = {name: value for name, value in given.items() if name not in inputs}
        if self.recorder.failed or any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(others)):
            self._forget()
            with cache.counted():
                return step()
        kind = held.evicting, held.filling, _shapes(inputs), others, _settings(cache, self.recorder.device)
        if kind != self.kind:
            self.kind = kind
            self._forget()
            with cache.counted():
                return self.recorder.watch(step)
        if not self.tried:
            self._record(cache, forward, given, inputs, held)
        with cache.counted():
            if self.recording is None:
                return step()
            for schedule, state in self.states:  # after steps that were not recorded
                schedule.settle(state)
                schedule.restore(state)
            for name, tensor in inputs.items():
                self.inputs[name].copy_(tensor)
            self.recording.replay()
        return _copied(self.output, {OWN: cache})

    def of_a_copy(self) -> GraphedStep:
        """The same for a copy of the cache, whose steps are recorded anew."""
        return GraphedStep(self.recorder)

    def _forget(self) -> None:
        """Let go of a recording, and of its memory."""
        self.recording: Recording | None = None
        self.tried = False
        self.inputs: dict[str, torch.Tensor] = {}
        self.output: Any = None
        self.states: list[tuple[Schedule, list[torch.Tensor]]] = []

    def _record(
        self,
        cache: SqueezeCache,
        forward: Callable[..., ModelOutput],
        given: dict[str, Any],
        inputs: dict[str, torch.Tensor],
        held: Held,
    ) -> None:
        """Record a step, of which nothing is done yet."""
        self.tried = True
        with torch.inference_mode(False), torch.no_grad():  # as tensors that may be written into in any mode
            self.inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        self.states = [(schedule, schedule.own()) for schedule in cache.schedules]
        dtype, kind = autocast_dtype(self.recorder.device), self.recorder.device.type

        def step() -> ModelOutput:
            cache.begin_step(held)
            # What autocast has cast is cast anew: what it keeps is gone when its block ends.
            with nullcontext() if dtype is None else torch.autocast(kind, dtype=dtype, cache_enabled=False):
                output = forward(**given | self.inputs)
            for schedule, state in self.states:
                schedule.settle(state)
            return output

        try:
            made = self.recorder.record(step)
        finally:
            for schedule, state in self.states:
                schedule.restore(state)
        if made is not None:
            self.recording, output = made
            self.output = _copied(output, {cache: OWN}, tensors=False)


#: Stands for the cache in the output of a recorded step.
OWN = object()


def _shapes(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in inputs.items()}


def _settings(cache: SqueezeCache, device: torch.device) -> tuple[Any, ...]:
    """What a model's pass depends on beside its arguments."""
    model = cache.owner[0]
    asked = (getattr(model.config, name, None) for name in ("output_hidden_states", "output_router_logits"))
    return model.training, autocast_dtype(device), *asked


def _copied(output: Any, others: dict[Any, Any], tensors: bool = True) -> Any:
    """An output with others of its parts, and with copies of its tensors, which the next replay does not change."""
    if isinstance(output, torch.Tensor):
        return output.clone() if tensors else output
    if isinstance(output, ModelOutput):
        return type(output)(**{name: _copied(value, others, tensors) for name, value in output.items()})
    if isinstance(output, tuple):
        return tuple(_copied(part, others, tensors) for part in output)
    return next((other for part, other in others.items() if part is output), output)
