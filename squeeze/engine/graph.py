"""A decode step as one CUDA graph: recorded once, and launched as a whole from then on.

A step of a small model, or of a small batch, is thousands of short kernels, and a GPU waits for the CPU to launch
them. A graph is launched by one call. It does the same to the same memory every time, so what changes from step to
step must lie there: tokens and positions are copied to where the graph was recorded with them, and the cache counts
its own positions up in place.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from transformers.utils import ModelOutput

from squeeze.engine.cache import Held, SqueezeCache
from squeeze.errors import InputError
from squeeze.text import message_of


class Recording(Protocol):
    """What a device does in a step, to be done again."""

    def record(self, step: Callable[[], Any]) -> Any:
        """What `step` returns, whose tensors are filled by `replay`."""

    def replay(self) -> None:
        """Have the device do it."""


class CudaGraph:
    """`torch.cuda.CUDAGraph`. Other threads may use the GPU while it is recorded."""

    def __init__(self) -> None:
        self.graph = torch.cuda.CUDAGraph()

    def record(self, step: Callable[[], Any]) -> Any:
        stream, own = torch.cuda.current_stream(), torch.cuda.Stream()
        own.wait_stream(stream)
        with torch.cuda.stream(own):
            self.graph.capture_begin(capture_error_mode="thread_local")
            try:
                output = step()
            finally:
                self.graph.capture_end()
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
        failed: whether it has.
        recorded: how many recordings were made.
    """

    def __init__(self) -> None:
        self.failed, self.recorded = False, 0

    def record(self, step: Callable[[], Any], device: torch.device) -> tuple[Recording, Any] | None:
        """A recording, and what `step` returns; None, and a warning that says why, where there can be none."""
        recording = RECORDINGS[device.type]()
        try:
            output = recording.record(step)
        except Exception as error:  # whatever a kernel, or a question to the host, raises while it is recorded
            self.failed = True
            message = f"decode steps go on without a CUDA graph, which could not be recorded: {message_of(error)}"
            warnings.warn(message, stacklevel=2)
            return None
        self.recorded += 1
        return recording, output


class GraphedStep:
    """The decode steps of one cache, whose attention looks at empty slots, too, so that shapes stay what they are.

    The first step of a kind is run kernel by kernel, which loads them as well; the second one is recorded, and it and
    all that follow are replayed. Of kinds there are at most four: whether some row has empty slots, and whether
    something was evicted. The cache is not held here, which holds this: so its memory is free as soon as nobody else
    holds it.

    Attributes:
        kind: of the last step.
        recording: of steps of this kind; None before there is one.
        inputs, output: the tensors that it reads, by their arguments' names, and what it fills.
    """

    def __init__(self, recorder: Recorder):
        self.recorder = recorder
        self.kind: tuple[Any, ...] | None = None
        self.recording: Recording | None = None
        self.inputs: dict[str, torch.Tensor] = {}
        self.output: Any = None

    def __call__(self, cache: SqueezeCache, forward: Callable[..., ModelOutput], given: dict[str, Any]) -> ModelOutput:
        """The decoder's output over one more token of each sequence.

        Args:
            cache: always the same.
            forward: the decoder's own pass on it, which returns no tuple.
            given: its other arguments, positions among them, but no mask, which squeezed attention does not look at.
        """
        inputs = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        held = cache.held(len(inputs["input_ids" if "input_ids" in inputs else "inputs_embeds"]))
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in inputs.items()}
        kind = held.evicting, held.filling, shapes, {name: given[name] for name in given if name not in inputs}
        if kind != self.kind:
            self.kind, self.recording = kind, None
        elif self.recording is None and not self.recorder.failed:
            self._record(cache, forward, given, inputs, held)
        with cache.counted():
            if self.recording is None:
                cache.begin_step(held)
                return forward(**given)
            for name, tensor in inputs.items():
                self.inputs[name].copy_(tensor)
            self.recording.replay()
        return _copied(self.output, {OWN: cache})

    def of_a_copy(self) -> GraphedStep:
        """The same for a copy of the cache, whose steps are recorded anew."""
        return GraphedStep(self.recorder)

    def _record(
        self,
        cache: SqueezeCache,
        forward: Callable[..., ModelOutput],
        given: dict[str, Any],
        inputs: dict[str, torch.Tensor],
        held: Held,
    ) -> None:
        """Record a step, of which nothing is done yet."""
        self.inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        schedules = [(schedule, schedule.own()) for schedule in cache.schedules]

        @torch.no_grad()
        def step() -> ModelOutput:
            cache.begin_step(held)
            output = forward(**given | self.inputs)
            for schedule, state in schedules:
                schedule.settle(state)
            return output

        try:
            made = self.recorder.record(step, cache.squeezed[0].keys.device)
        finally:
            for schedule, state in schedules:
                schedule.restore(state)
        if made is not None:
            self.recording, output = made
            self.output = _copied(output, {cache: OWN}, tensors=False)


#: Stands for the cache in the output of a recorded step.
OWN = object()


def _copied(output: Any, others: dict[Any, Any], tensors: bool = True) -> Any:
    """An output with others of its parts, and with copies of its tensors, which the next replay does not change."""
    if isinstance(output, torch.Tensor):
        return output.clone() if tensors else output
    if isinstance(output, ModelOutput):
        return type(output)(**{name: _copied(value, others, tensors) for name, value in output.items()})
    if isinstance(output, tuple):
        return tuple(_copied(part, others, tensors) for part in output)
    return next((other for part, other in others.items() if part is output), output)
