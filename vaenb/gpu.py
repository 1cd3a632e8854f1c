"""How this project computes on a GPU, if there is one: as precisely as on a CPU, and steps of training as CUDA graphs.

Importing it makes PyTorch's convolutions on GPUs as precise as other operations in single precision, in the whole process.

A step of the small models here is hundreds of kernels of a few microseconds each. To ask for them one by one takes a process
several times as long as the GPU needs to compute them; a graph, recorded once, asks for all of them at once.
"""

import copy
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)
WARM_UP = 3  # ordinary steps before the recording: libraries choose their algorithms, optimisers make their state

torch.backends.cudnn.allow_tf32 = False  # which convolutions round to 10 bits by default


def device() -> torch.device:
    """Where to compute: PyTorch's current GPU if it sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def there(module: Module) -> Module:
    """The module where to compute: itself on a machine without a GPU, else a copy on it."""
    return copy.deepcopy(module).to(device()) if torch.cuda.is_available() else module


class Step:
    """A step of training, recorded and replayed on a GPU; anywhere else an ordinary call.

    What it does must depend on its inputs' shapes alone: no decision on numbers that are on the GPU, and random numbers by
    ``drawn``, or from the GPU as those of dropout. Inputs of other shapes than the first ones, such as a smaller last batch,
    are never recorded.

    Args:
        work: of tensors on ``place``; what it reads and changes stays where it is in memory.
        optimiser: that it steps. If it is recorded, learning rates become numbers on the GPU: ``set_learning_rate``.
        place: where the module is that is trained.
        record: whether to record it at all.
    """

    current: "Step | None" = None  # the one that is at work

    def __init__(
        self, work: Callable[..., Tensor], optimiser: torch.optim.Optimizer, place: torch.device, record: bool = True
    ):
        self.work, self.place = work, place
        self.records = record and place.type == "cuda"
        self.steps, self.inputs = 0, list[Tensor]()
        self.draws = list[tuple[Callable[[], Tensor], Tensor]]()  # what is drawn in each step, and where the graph finds it
        self.waiting = deque[Tensor]()
        self.graph: torch.cuda.CUDAGraph | None = None
        if self.records:
            self.aside = torch.cuda.Stream()
            for group in optimiser.param_groups:
                group.update(lr=torch.tensor(float(group["lr"]), device=place), capturable=True)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What ``work`` returns for these inputs, which may be on the CPU; the next call may overwrite it."""
        if self.records and not self.inputs:
            self.inputs = [torch.empty_like(given, device=self.place) for given in inputs]
        if not self.records or [mine.shape for mine in self.inputs] != [given.shape for given in inputs]:
            return self.work(*(given.to(self.place) for given in inputs))
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        for numbers, kept in self.draws:
            kept.copy_(numbers())
        self.steps += 1
        if self.steps <= WARM_UP:
            self.aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.aside):
                result = self._work()
            torch.cuda.current_stream().wait_stream(self.aside)
            return result
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self._work()
        self.graph.replay()
        return self.result

    def _work(self) -> Tensor:
        self.waiting.extend(kept for _, kept in self.draws)
        Step.current = self
        try:
            return self.work(*self.inputs)
        finally:
            Step.current = None
            self.waiting.clear()

    def _draw(self, numbers: Callable[[], Tensor]) -> Tensor:
        if self.steps == 1:
            self.draws.append((numbers, numbers().to(self.place)))
            return self.draws[-1][1]
        return self.waiting.popleft()


def drawn(numbers: Callable[[], Tensor], place: torch.device) -> Tensor:
    """Random numbers, from the CPU so that they are the same on every device; in a recorded ``Step`` new ones every time.

    Args:
        numbers: draws them, always as many. It is kept, and so are the tensors that it knows.
        place: where they are wanted.
    """
    return numbers().to(place) if Step.current is None else Step.current._draw(numbers)


def set_learning_rate(group: dict[str, Any], value: float) -> None:
    """Set that of a group of parameters, also where a recorded ``Step`` finds it."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(value)
    else:
        group["lr"] = value
