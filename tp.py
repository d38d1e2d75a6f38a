"""Tensor parallelism: every rank of a torchrun holds a slice of each matrix and computes its share of each layer.

    torchrun --standalone --nproc_per_node 2 generate.py --compile --prompt "def read_lines(path):"

    with tp.join("auto") as group:                      # the ranks of a torchrun, or this process alone
        model = load_model(path, group.device, group=group)

The cut is Megatron-LM's, https://arxiv.org/abs/1909.08053. wqkv and w13 are cut by their outputs (q, k, v, gate and up
each by itself, so a rank has whole heads), wo and w2 by their inputs, so that what the ranks compute adds up: two
all-reduces a layer, inside the compiled graph. The embedding and the output projection are cut by the vocabulary.
slices.py says which slice of a tensor is whose, and what pads the last ones where the ranks do not divide a width.

model.py knows nothing of this but that its logits may be a slice of the vocabulary: a rank's model is an ordinary one
of fewer heads and a narrower feed-forward, in which `parallelize` wraps the layers whose outputs have to be added up.
All ranks have the same logits to the last bit, since each logit is computed by one of them, and so, on equal machines,
draw the same tokens. Lifeline (lifeline.py) ends all of them when one has failed.
"""

import argparse
import contextlib
import itertools
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from config import ModelConfig
from errors import UserError, log, world_size
from kernels import build
from lifeline import START, Lifeline
from model import MixtureOfExperts, Norm, Transformer
from slices import Slices, inputs_shared

T = TypeVar("T")
BACKENDS = ("auto", "shm", "gloo", "nccl")
COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # ranks may compile for minutes; the lifeline notices dead ones sooner
JOIN_TIMEOUT = timedelta(seconds=START)
PIECE_BYTES = 2**22  # what rank 0 sends at a time: a store takes 8 MiB
SYMMETRIC_BYTES = 2**17  # the largest one-shot all-reduce: one kernel, no copies, as in a decode step


@dataclass(frozen=True)
class Group:
    """The ranks that share a model, and this one's place among them. By default it is alone."""

    rank: int = 0
    size: int = 1
    device: torch.device | None = None
    sharing: int = 1  # ranks that share this machine's memory
    backend: str = ""
    all_reduce: "AllReduce | None" = None
    store: dist.Store | None = None
    counter: Iterator[int] | None = None  # numbers the messages of rank 0

    def __deepcopy__(self, memo: dict) -> "Group":
        return self

    # Messages

    def from_rank_0(self, produce: Callable[[], T]) -> T:
        """What `produce` returns on rank 0, on every rank; a UserError that it raises there is raised on every rank.

        There is no time limit: it may wait for a user at a keyboard. The last rank that has read a message deletes it.
        """
        if self.size == 1:
            return produce()
        key = f"message/{next(self.counter)}"
        if self.rank == 0:
            try:
                result = (produce(), None)
            except UserError as error:
                result = (None, str(error))
            data = pickle.dumps(result)
            pieces = [data[at : at + PIECE_BYTES] for at in range(0, len(data), PIECE_BYTES)]
            for i, piece in enumerate(pieces):
                self.store.set(f"{key}/{i}", piece)
            self.store.set(key, str(len(pieces)))
        else:
            while True:
                with contextlib.suppress(dist.DistStoreError):  # not yet
                    self.store.wait([key], timedelta(minutes=1))
                    break
            count = int(self.store.get(key))
            pieces = [f"{key}/{i}" for i in range(count)]
            result = pickle.loads(b"".join(map(self.store.get, pieces)))
            if self.store.add(f"{key}/readers", 1) == self.size - 1:
                for name in (key, f"{key}/readers", *pieces):
                    self.store.delete_key(name)
        if result[1] is not None:
            raise UserError(result[1])
        return result[0]

    def check_same(self, about: dict[str, Any]) -> None:
        """UserError on a rank where one of these values differs from rank 0's."""
        for name, value in self.from_rank_0(lambda: about).items():
            if about[name] != value:
                raise UserError(f"{name} is {about[name]} here and {value} on rank 0; give all ranks the same")

    def check_flags(
        self, args: argparse.Namespace, elsewhere: tuple[str, ...] = (), checksums: Callable[[], list[str]] = list
    ) -> None:
        """check_same of a script's flags, except those that may differ `elsewhere`, and of its checkpoints."""
        if self.size > 1:
            flags = {f"--{name}": value for name, value in vars(args).items() if name not in elsewhere}
            self.check_same(flags | {f"the checksum of checkpoint {i}": text for i, text in enumerate(checksums())})

    # Sharing a model. `groupsizes`: see slices.py

    def check(self, config: ModelConfig, groupsizes: Mapping[str, int]) -> None:
        """UserError where the ranks cannot share the heads, or a layer has fewer groups of inputs than ranks."""
        heads, kv_heads = config.n_heads, config.n_kv_heads
        if heads % self.size or (kv_heads % self.size and self.size % kv_heads):
            raise UserError(
                f"{self.size} ranks cannot share {heads} attention heads with {kv_heads} key-value heads; use a number "
                "that divides the former, and that divides the latter or is a multiple of it"
            )
        for layer, groupsize in groupsizes.items():
            inputs = inputs_shared(config, layer)
            if groupsize and inputs and inputs < self.size * groupsize:
                raise UserError(
                    f"{self.size} ranks cannot share the {inputs} inputs of {layer} in groups of {groupsize}; "
                    "use fewer ranks or smaller groups"
                )

    def slices(self, config: ModelConfig, groupsizes: Mapping[str, int]) -> Slices:
        """Which slice of each tensor this rank holds, of a model that `check` has passed."""
        return Slices(self.rank, self.size, config, groupsizes)

    def parallelize(self, model: Transformer, config: ModelConfig) -> Transformer:
        """Makes a model of `slices(config).config` a rank's share of one of `config`: its outputs become those of all.

        Its config keeps the rank's own heads and widths, since so are its caches; the vocabulary is the whole one.
        """
        if self.size == 1:
            return model
        own, head_dim = model.config, config.head_dim
        for block in model.layers:
            attention, feed_forward = block.attention, block.feed_forward
            attention.wo = RowParallel(attention.wo, config.n_heads * head_dim, own.n_heads * head_dim, self)
            if config.qk_norm == "all":
                attention.q_norm, attention.k_norm = (
                    NormOfAllRanks(norm, self) for norm in (attention.q_norm, attention.k_norm)
                )
            if isinstance(feed_forward, MixtureOfExperts):
                feed_forward.experts = SumOfAllRanks(feed_forward.experts, self)
                if feed_forward.shared is not None:
                    whole, part = config.experts.shared_width, own.experts.shared_width
                    feed_forward.shared.w2 = RowParallel(feed_forward.shared.w2, whole, part, self)
            else:
                feed_forward.w2 = RowParallel(feed_forward.w2, config.ffn_dim, own.ffn_dim, self)
        model.vocabulary = AllGather(config.vocab_size, own.vocab_size, self)
        model.tok_embeddings = VocabParallelEmbedding(model.tok_embeddings.weight, self)
        model.config = replace(own, vocab_size=config.vocab_size)
        return model


ALONE = Group()


# ---------------------------------------------------------------------------------------------------------------------
# Layers


class AllReduce(nn.Module):
    """The sum over the ranks, on each of them, in the order of the ranks or one that is the same for all."""

    def __init__(self, name: str, symmetric: Tensor | None = None):
        """`name` of a process group, "" for shared memory; a buffer of symmetric memory for sums that fit."""
        super().__init__()
        self.name = name
        self.register_buffer("symmetric", symmetric, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        if self.name == "":
            return torch.ops.brisk.all_reduce(x)
        fits = self.symmetric is not None and x.nbytes <= self.symmetric.nbytes
        if fits and x.dtype != torch.float16:  # PyTorch has no one-shot all-reduce of that
            return one_shot_all_reduce(self.symmetric, x, self.name)
        return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", self.name))


# An op of its own: with PyTorch's, Inductor would replace the buffer by one of its own, which takes another kernel.
@torch.library.custom_op("brisk::one_shot_all_reduce", mutates_args=())
def one_shot_all_reduce(buffer: Tensor, x: Tensor, name: str) -> Tensor:
    """The sum over the ranks of a process group; `buffer` [bytes] is this rank's symmetric memory."""
    room = buffer[: x.nbytes].view(x.dtype).view(x.shape)
    return torch.ops.symm_mem.one_shot_all_reduce_copy(room, x, "sum", name)


one_shot_all_reduce.register_fake(lambda buffer, x, name: torch.empty_like(x))


class AllGather(nn.Module):
    """A last dimension of which each rank has a slice: puts the slices together, or finds the largest element."""

    def __init__(self, size: int, width: int, group: Group):
        """`size` without the padding that slices of this width end in."""
        super().__init__()
        self.size, self.width, self.group, self.all_reduce = size, width, group, group.all_reduce
        # Tensors, not numbers: so all ranks compile the same code.
        rank = torch.tensor(group.rank, device=group.device)
        own = rank * width + torch.arange(width, device=group.device)
        self.register_buffer("first", rank * width, persistent=False)
        self.register_buffer("is_own", torch.arange(group.size, device=group.device) == rank, persistent=False)
        self.register_buffer("is_padding", own >= size if size < group.size * width else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., size]."""
        slices = torch.where(self.is_own[:, None], x[..., None, :], 0)
        return self.all_reduce(slices.flatten(-2)[..., : self.size])

    def max(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., width] -> the largest element of all ranks, float32 [...], and its index."""
        if self.is_padding is not None:
            x = x.masked_fill(self.is_padding, -torch.inf)
        value, index = x.max(-1)
        # As float32, which is exact up to 2^24, the largest vocabulary that config.py takes.
        found = torch.stack((value.float(), (index + self.first).float()), -1)
        value, index = self.all_reduce(torch.where(self.is_own, found[..., None], 0)).unbind(-2)  # [..., ranks]
        rank = value.argmax(-1, keepdim=True)
        return value.gather(-1, rank)[..., 0], index.gather(-1, rank)[..., 0].long()

    def broadcast(self, tokens: Tensor) -> Tensor:
        """Rank 0's token ids."""
        return self.all_reduce(torch.where(self.is_own[0], tokens, 0).float()).long()


class RowParallel(nn.Module):
    """A linear layer of which this rank has a slice of the inputs."""

    def __init__(self, linear: nn.Module, size: int, width: int, group: Group):
        """`size` inputs of all ranks, of which this one computes a slice of `width`."""
        super().__init__()
        self.linear, self.all_reduce = linear, group.all_reduce
        # Where the layer has a slice of other inputs it takes them from all: act-order, groups that go on past a rank.
        ordered = getattr(linear, "order", None) is not None
        other = ordered or linear.in_features != width
        self.gather = AllGather(size, width, group) if other else None
        own = group.rank * linear.in_features + torch.arange(linear.in_features, device=group.device)
        index = own.clamp(max=size - 1) if other and not ordered else None  # any input for padding
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.gather is None else self.gather(x)
        x = x if self.index is None else x[..., self.index]
        return self.all_reduce(self.linear(x))


class SumOfAllRanks(nn.Module):
    """A module of which each rank computes a share of the output's sum."""

    def __init__(self, module: nn.Module, group: Group):
        super().__init__()
        self.module, self.all_reduce = module, group.all_reduce

    def forward(self, *args: Tensor) -> Tensor:
        return self.all_reduce(self.module(*args))


class NormOfAllRanks(nn.Module):
    """An RMSNorm over a last dimension of which each rank has a slice, all as wide; some may have the same."""

    def __init__(self, norm: Norm, group: Group):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps
        self.ranks, self.all_reduce = group.size, group.all_reduce

    def forward(self, x: Tensor) -> Tensor:
        squares = self.all_reduce(x.float().square().mean(-1, keepdim=True)) / self.ranks
        return (x.float() * (squares + self.eps).rsqrt()).to(x.dtype) * self.weight


class VocabParallelEmbedding(nn.Module):
    """Takes the place of model.Embedding, with the rows of this rank's slice of the vocabulary."""

    def __init__(self, weight: nn.Parameter, group: Group):
        super().__init__()
        self.weight, self.all_reduce = weight, group.all_reduce
        first = torch.tensor(group.rank * len(weight), device=group.device)
        self.register_buffer("first", first, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        row = tokens - self.first
        is_own = (row >= 0) & (row < len(self.weight))
        x = F.embedding(torch.where(is_own, row, 0), self.weight)
        return self.all_reduce(torch.where(is_own[..., None], x, 0))


# ---------------------------------------------------------------------------------------------------------------------
# Joining


def pick_device(name: str) -> torch.device:
    """ "auto", "cpu", "cuda" or "mps" -> the device. UserError when it is not available."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(device for device in ("cuda", "mps", "cpu") if available[device])
    if not available[name]:
        raise UserError(f"--device {name} is not available here; use one of {[d for d in available if available[d]]}")
    return torch.device(name)


@contextlib.contextmanager
def join(device: str = "auto", backend: str = "auto", threads: int | None = None) -> Iterator[Group]:
    """Meets the other ranks of a torchrun -> the group, for as long as the context lasts.

    `device`: see pick_device. Backends: NCCL on GPUs; on CPUs shared memory among the ranks of one machine, gloo
    otherwise. `threads` of a rank, by default one a core, or OMP_NUM_THREADS above 1. Only rank 0 has an output. When a
    rank fails or dies all end within seconds, each with an `error:` line.
    """
    device, size = pick_device(device), world_size()
    if threads is not None:
        torch.set_num_threads(threads)
    if size == 1:
        if backend != "auto" and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise UserError("--backend is for several ranks; start them by torchrun, or leave it out")
        yield Group(device=device)
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    on_this_machine = int(os.environ["LOCAL_WORLD_SIZE"])
    backend = choose_backend(backend, device, on_this_machine == size, on_this_machine)
    if device.type == "cuda":
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        take_cores(local_rank, on_this_machine, threads)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"cannot reach the other ranks at {where} ({error}); check the address and start all"
        ) from error
    with Lifeline(store.clone(), rank, size), only_rank_0_prints(rank):
        if backend == "shm":
            share_memory(store, rank, size)
            all_reduce = AllReduce("")
        else:
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("group", store),
                rank=rank,
                world_size=size,
                timeout=COLLECTIVE_TIMEOUT,
                device_id=device if backend == "nccl" else None,
            )
            shared = symmetric_buffer(device) if backend == "nccl" and on_this_machine == size else None
            all_reduce = AllReduce(dist.group.WORLD.group_name, shared)
        sharing = on_this_machine if device.type == "cpu" else 1
        group = Group(rank, size, device, sharing, backend, all_reduce, store, itertools.count())
        # The last bits of what each rank computes for itself depend on these.
        group.check_same({"threads": torch.get_num_threads(), "processor": torch.backends.cpu.get_cpu_capability()})
        yield group
        if backend == "nccl" and (graphs := sys.modules.get("torch._inductor.cudagraph_trees")):
            torch.cuda.synchronize()
            graphs.reset_cudagraph_trees()  # NCCL would wait for the graphs that its kernels are in
        if backend != "shm":
            dist.destroy_process_group()


def choose_backend(backend: str, device: torch.device, one_machine: bool, on_this_machine: int) -> str:
    """The backend that "auto" means. UserError for one that cannot be used here."""
    can_share = device.type == "cpu" and one_machine and hasattr(os, "memfd_create")
    if backend == "auto":
        on_cpu = "shm" if can_share and kernels.cpu_library() is not None else "gloo"
        backend = "nccl" if device.type == "cuda" else on_cpu
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"several ranks on {device.type} are not supported; add --device cpu")
    if backend == "shm" and not can_share:
        raise UserError("--backend shm is for CPUs of one machine, on Linux; use gloo")
    if backend == "nccl":
        if device.type != "cuda":
            raise UserError(f"--backend nccl is for GPUs, not for {device.type}; use gloo")
        if on_this_machine > torch.cuda.device_count():
            raise UserError(
                f"{on_this_machine} ranks want a GPU each, here are {torch.cuda.device_count()}; start fewer, or share "
                "them by --backend gloo"
            )
    return backend


def take_cores(local_rank: int, ranks: int, threads: int | None) -> None:
    """Each rank of a machine computes on cores of its own, by default with a thread on each physical one."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0), key=core_location)
    count = len(cores) // ranks  # as many for each: the last bits of sums depend on the number of threads
    if own := cores[local_rank * count : (local_rank + 1) * count]:
        os.sched_setaffinity(0, own)
        # Torchrun sets the variable to 1 where the user has not set it.
        if threads is None and os.environ.get("OMP_NUM_THREADS", "1") == "1":
            torch.set_num_threads(len({core_location(core)[:2] for core in own}))


def core_location(core: int) -> tuple[int, int, int]:
    """Where a logical core is: socket, physical core, itself."""
    topology = Path(f"/sys/devices/system/cpu/cpu{core}/topology")
    try:
        return *(int((topology / name).read_text()) for name in ("physical_package_id", "core_id")), core
    except OSError:
        return 0, core, core


def share_memory(store: dist.Store, rank: int, size: int) -> None:
    """Gives brisk::all_reduce memory that all ranks have mapped, from a file without a name: none is left behind."""
    if rank == 0:
        file = os.memfd_create("gpt-brisk")
        store.set("memory", f"/proc/{os.getpid()}/fd/{file}")
    else:
        store.wait(["memory"], JOIN_TIMEOUT)
        file = os.open(store.get("memory").decode(), os.O_RDWR)
    build.open_channel(file, rank, size)
    store.set(f"mapped/{rank}", "")
    store.wait([f"mapped/{other}" for other in range(size)], JOIN_TIMEOUT)
    os.close(file)


def symmetric_buffer(device: torch.device) -> Tensor | None:
    """Memory that the GPUs of one machine read from each other, None where they cannot: for one-shot all-reduces."""
    import torch.distributed._symmetric_memory as symmetric_memory

    buffer, peers = None, set(range(torch.cuda.device_count())) - {device.index}
    if all(torch.cuda.can_device_access_peer(device, peer) for peer in peers):
        with contextlib.suppress(RuntimeError):  # a driver or a link without it
            buffer = symmetric_memory.empty(SYMMETRIC_BYTES, dtype=torch.uint8, device=device)
    if all_have(buffer, device):
        try:
            symmetric_memory.rendezvous(buffer, dist.group.WORLD)
        except RuntimeError as error:
            log(f"warning: no symmetric memory ({str(error).splitlines()[0]}), so decoding on these GPUs is slower")
            buffer = None
        if all_have(buffer, device):
            return buffer
    return None


def all_have(buffer: Tensor | None, device: torch.device) -> bool:
    have = torch.tensor(buffer is not None, dtype=torch.int32, device=device)
    dist.all_reduce(have, dist.ReduceOp.MIN)
    return bool(have.item())


@contextlib.contextmanager
def only_rank_0_prints(rank: int) -> Iterator[None]:
    """Discards the output of the other ranks, except their errors."""
    if rank == 0:
        yield
        return
    streams = sys.stdin, sys.stdout, sys.stderr
    with open(os.devnull, "r+", encoding="utf-8", errors="replace") as nowhere:
        sys.stdin = sys.stdout = sys.stderr = nowhere
        try:
            yield
        finally:
            sys.stdin, sys.stdout, sys.stderr = streams
