"""Listens to every operation of a step: what it computes, moves, sends and keeps.

It works on fake tensors and on real ones alike, so that what is planned can be held to what a run does.
"""

import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
ATTENTION = "scaled_dot_product"
# In place of a block's name.
OUTSIDE = "outside of blocks"
# Begins a block's name; its number follows.
BLOCK = "block "
# Gives memory and writes nothing into it.
ALLOCATIONS = {aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten.new_empty_strided}
# Moves what is there, in another order, place or type of number, and computes nothing.
COPIES = {aten.copy_, aten.clone, aten._to_copy, aten.cat, aten.stack, aten._foreach_copy_}
# Collective operations of torch.distributed by what they do; of those with two tensors the larger one is the message.
COLLECTIVES = {
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "broadcast_": "broadcast",
    "allgather_": "all-gather",
    "_allgather_base_": "all-gather",
    "allgather_coalesced_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "reduce_scatter_": "reduce-scatter",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "alltoall_base_": "all-to-all",
    "alltoall_": "all-to-all",
    "send": "send",
    "recv_": "receive",
}


class Operation(NamedTuple):
    """A kind of computation: ``product``, ``attention``, ``element-wise`` or ``copy``, in the pass that it belongs to."""

    kind: str
    phase: str  # forward, backward or update
    dtype: str
    flops: int  # 2 for a multiply and an add; 0 for what is element-wise, and for copies
    bytes: int  # read and written
    shapes: str = ""  # of the operands of a product or of attention


class Collective(NamedTuple):
    """A kind of message: what it is, of which size, and between which ranks."""

    kind: str
    phase: str
    bytes: int  # of the whole message as this rank has it: what it sends or, where that is more, what it gets
    ranks: tuple[int, ...]
    is_data_parallel: bool = False  # gradients that are reduced, or parameters that are gathered


class Place(NamedTuple):
    """Where a tensor was made: in which block of the model, or outside of them, and in which pass."""

    part: str
    phase: str


BEFORE = Place("freed of what was there before", "")


@dataclass
class Memory:
    """Bytes of all storages that are alive, and since :meth:`begin` who made them.

    Attributes:
        live: now.
        peak: the most since the beginning.
    """

    live: int = 0
    peak: int = 0
    _known: dict[int, tuple[int, Place]] = field(default_factory=dict)
    _changes: list[tuple[Place, int]] = field(default_factory=list)
    _before: int = 0

    def begin(self) -> None:
        """Let the peak begin at what is alive now."""
        self.peak = self._before = self.live
        self._changes.clear()
        self._known = {key: (size, BEFORE) for key, (size, _) in self._known.items()}

    def see(self, tensor: Tensor, part: str, phase: str) -> None:
        """Count the storage of a tensor from now until it is freed; one on the device ``meta`` has none."""
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size, place = storage.nbytes(), Place(part, phase)
        self._known[key] = size, place
        self._change(place, size)
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key)

    def at_peak(self) -> Counter[Place]:
        """Return the bytes at the fullest moment on top of what was alive at the beginning, by who made them."""
        found: Counter[Place] = Counter()
        live = most = self._before
        last = 0
        for number, (_, size) in enumerate(self._changes):
            live += size
            if live > most:
                most, last = live, number + 1
        for place, size in self._changes[:last]:
            found[place] += size
        return Counter({place: size for place, size in found.items() if size != 0})

    def _change(self, place: Place, size: int) -> None:
        self.live += size
        self._changes.append((place, size))

    def _forget(self, key: int) -> None:
        if key in self._known:
            size, place = self._known.pop(key)
            self._change(place, -size)


class Listener(TorchDispatchMode):
    """Counts operations, messages and memory of what runs inside.

    Messages between fake tensors go nowhere, and what the host reads from them is 1, of bytes 0.

    Attributes:
        operations: how often each took place.
        collectives: how often each took place.
        memory: counts the memory of all tensors that came by.
        is_updating: the optimizer is at work, neither a forward nor a backward pass.
        is_data_parallel: what is sent now are gradients or parameters.
        place: the block of the model that is at work, or OUTSIDE.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[Operation] = Counter()
        self.collectives: Counter[Collective] = Counter()
        self.memory = Memory()
        self.is_updating = self.is_data_parallel = False
        self.place = OUTSIDE

    def begin(self) -> None:
        """Forget what was counted, and let the peak of memory begin at what is alive now."""
        self.operations.clear()
        self.collectives.clear()
        self.memory.begin()
        self.is_updating, self.place = False, OUTSIDE

    @property
    def phase(self) -> str:
        """The pass that is under way: a recomputed forward pass belongs to the backward pass."""
        if self.is_updating:
            return "update"
        return "backward" if torch._C._current_graph_task_id() != -1 else "forward"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Let an operation run, or answer in the place of what fake tensors cannot, and count it."""
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            # Bytes are DeepSpeed's flags of gradients that are not finite.
            return 1.0 if args[0].is_floating_point() else int(args[0].dtype is not torch.uint8)
        if func.namespace == "c10d":
            return self._communicate(func, args, kwargs)
        result = func(*args, **kwargs)
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        for tensor in outputs:
            self.memory.see(tensor, OUTSIDE if self.is_updating else self.place, self.phase)
        self._count(func, args, kwargs, result, inputs, outputs)
        return result

    def _count(
        self, func: Any, args: Any, kwargs: Any, result: Any, inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        packet = func.overloadpacket
        if packet in ALLOCATIONS or not outputs or _is_view(func, inputs, outputs):
            return
        flops = 0
        if packet is aten._grouped_mm:
            flops = 2 * args[0].shape[0] * args[0].shape[-1] * outputs[0].shape[-1]
            if args[1].dim() == 2:  # the gradient of the weights: rows of both are summed by groups
                flops = 2 * args[0].shape[-2] * args[0].shape[-1] * args[1].shape[-1]
        elif packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=result)
        kind, shapes = "copy" if packet in COPIES else "element-wise", ""
        if flops > 0:
            kind = "attention" if ATTENTION in str(packet) else "product"
            shapes = " ".join("x".join(map(str, tensor.shape)) for tensor in inputs)
        moved = sum(tensor.numel() * tensor.itemsize for tensor in (*inputs, *outputs))
        self.operations[Operation(kind, self.phase, _name(outputs[0].dtype), flops, moved, shapes)] += 1

    def _communicate(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kind = COLLECTIVES.get(str(func.overloadpacket).rpartition(".")[2])
        tensors = [_tensors(argument) for argument in args]
        if kind is not None:
            sizes = [sum(tensor.numel() * tensor.itemsize for tensor in each) for each in tensors]
            is_data = self.is_data_parallel and kind != "all-to-all"
            message = Collective(kind, self.phase, max(sizes), _ranks_of(args), is_data)
            self.collectives[message] += 1
        if not any(isinstance(tensor, FakeTensor) for each in tensors for tensor in each):
            return func(*args, **kwargs)
        work = FakeWork().boxed()
        return work if len(func._schema.returns) == 1 else (args[0], work)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _is_view(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Whether an operation hands on memory of its inputs without writing to it."""
    if func._schema.is_mutable:
        return False
    known = {tensor.untyped_storage()._cdata for tensor in inputs}
    return all(tensor.untyped_storage()._cdata in known for tensor in outputs)


def _ranks_of(args: tuple[Any, ...]) -> tuple[int, ...]:
    """Return the ranks of the process group among the arguments of a collective operation."""
    for argument in args:
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            group = dist.ProcessGroup.unbox(argument)
            return tuple(dist.get_process_group_ranks(group))
    raise AssertionError("a collective operation without a process group")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
