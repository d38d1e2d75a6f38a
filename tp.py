"""Tensor parallelism: every rank of a torchrun holds a slice of each matrix and computes its share of each layer.

    torchrun --standalone --nproc_per_node 2 generate.py --compile --prompt "def read_lines(path):"

    with tp.join(device) as group:                      # the ranks of a torchrun, or this process alone
        model = load_model(path, group.device, group=group)

The cut is Megatron-LM's, https://arxiv.org/abs/1909.08053. wqkv and w13 are cut by their outputs (q, k, v, gate and up
each by itself, so a rank has whole heads), wo and w2 by their inputs, so that what the ranks compute adds up: two
all-reduces a layer, inside the compiled graph. The embedding and the output projection are cut by the vocabulary.
Scales, groups, biases and the order of act-order go with their slices.

model.py knows nothing of this but that its logits may be a part of the vocabulary: a rank's model is an ordinary one
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
from collections.abc import Callable, Iterator
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
from model import Transformer

T = TypeVar("T")
BACKENDS = ("auto", "shm", "gloo", "nccl")
COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # ranks may compile for minutes; those that died the lifeline finds sooner
JOIN_TIMEOUT = timedelta(seconds=START)
PIECE_BYTES = 2**22  # what rank 0 tells at a time: a store takes 8 MiB
SYMMETRIC_BYTES = 2**17  # the largest sum that takes one shot


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
    counter: Iterator[int] | None = None  # numbers what rank 0 tells the others

    def __deepcopy__(self, memo: dict) -> "Group":
        return self

    # -----------------------------------------------------------------------------------------------------------------
    # Between the hosts' programs

    def from_rank_0(self, produce: Callable[[], T]) -> T:
        """What `produce` returns on rank 0, on every rank; a UserError that it raises there is raised on every rank.

        It may take as long as it wants, like a user at a keyboard.
        """
        if self.size == 1:
            return produce()
        key = f"told/{next(self.counter)}"
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
            result = pickle.loads(b"".join(self.store.get(f"{key}/{i}") for i in range(count)))
        if result[1] is not None:
            raise UserError(result[1])
        return result[0]

    def check_same(self, about: dict[str, Any]) -> None:
        """UserError on a rank for which one of these values is another than on rank 0."""
        for name, value in self.from_rank_0(lambda: about).items():
            if about[name] != value:
                raise UserError(f"{name} is {about[name]} here and {value} on rank 0; give all ranks the same")

    def check_flags(
        self, args: argparse.Namespace, elsewhere: tuple[str, ...] = (), checksums: Callable[[], list[str]] = list
    ) -> None:
        """check_same of a script's flags, but for those that differ from machine to machine, and of its checkpoints."""
        if self.size > 1:
            flags = {f"--{name}": value for name, value in vars(args).items() if name not in elsewhere}
            self.check_same(flags | {f"the checksum of checkpoint {i}": text for i, text in enumerate(checksums())})

    # -----------------------------------------------------------------------------------------------------------------
    # Which slice of which tensor

    def check(self, config: ModelConfig, groupsizes: dict[str, int]) -> None:
        """UserError where the sizes don't divide; `groupsizes` are those of the layers that are int4."""
        sizes = {
            "attention heads": config.n_heads,
            "feed-forward channels": config.ffn_dim,
            "tokens of the vocabulary": config.vocab_size,
        }
        for what, size in sizes.items():
            if size % self.size:
                raise UserError(f"{self.size} ranks cannot share {size} {what}; use a number that divides them")
        if config.n_kv_heads % self.size and self.size % config.n_kv_heads:
            raise UserError(
                f"{self.size} ranks cannot share {config.n_kv_heads} key-value heads; "
                "use a number that divides them, or a multiple of them"
            )
        inputs = {"wo": config.n_heads * config.head_dim, "w2": config.ffn_dim}
        for layer, groupsize in groupsizes.items():
            size = inputs.get(layer.rpartition(".")[2], 0)
            if groupsize and size % (self.size * groupsize):
                raise UserError(
                    f"{self.size} ranks cannot share the {size} inputs of {layer} in groups of {groupsize}; "
                    "use fewer ranks or smaller groups"
                )

    def local(self, config: ModelConfig) -> ModelConfig:
        """The shape of a rank's model. More ranks than key-value heads: each of these is on several ranks."""
        return replace(
            config,
            n_heads=config.n_heads // self.size,
            n_kv_heads=max(config.n_kv_heads // self.size, 1),
            ffn_dim=config.ffn_dim // self.size,
            vocab_size=config.vocab_size // self.size,
        )

    def part(self, config: ModelConfig, name: str, tensor: Tensor) -> Tensor:
        """This rank's slice of a tensor of the checkpoint, a view where that is possible."""
        layer, _, kind = name.rpartition(".")
        layer = layer.rpartition(".")[2]
        if self.size == 1 or layer not in ("wqkv", "w13", "wo", "w2", "tok_embeddings", "output"):
            return tensor
        if layer in ("wo", "w2"):
            if kind == "bias":  # it is added once
                return tensor if self.rank == 0 else torch.zeros_like(tensor)
            if kind == "scales" and tensor.ndim == 1:
                return tensor
            return tensor.chunk(self.size, 0 if kind == "order" else 1)[self.rank]
        if kind == "order":
            return tensor
        if layer == "w13":
            return torch.cat([half.chunk(self.size)[self.rank] for half in tensor.chunk(2)])
        if layer == "wqkv":
            heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
            slices = []
            for count, part in zip(heads, tensor.split([count * config.head_dim for count in heads]), strict=True):
                own = max(count // self.size, 1)
                slices.append(part.narrow(0, self.rank * count // self.size * config.head_dim, own * config.head_dim))
            return torch.cat(slices)
        return tensor.chunk(self.size)[self.rank]

    def parallelize(self, model: Transformer, config: ModelConfig) -> Transformer:
        """Makes a model of `local(config)` a rank's share of one of `config`: its outputs become those of all.

        Its config keeps the rank's own heads and widths, since so are its caches; the vocabulary is the whole one.
        """
        if self.size == 1:
            return model
        for block in model.layers:
            block.attention.wo = RowParallel(block.attention.wo, self)
            block.feed_forward.w2 = RowParallel(block.feed_forward.w2, self)
        model.vocabulary = Sliced(config.vocab_size, self)
        model.tok_embeddings = VocabParallelEmbedding(model.tok_embeddings.weight, self)
        model.config = replace(model.config, vocab_size=config.vocab_size)
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
        if fits and x.dtype != torch.float16:  # of which PyTorch has no one-shot sum
            return one_shot_all_reduce(self.symmetric, x, self.name)
        return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", self.name))


# An op of its own: Inductor would replace the buffer of PyTorch's by one that it fills by another kernel.
@torch.library.custom_op("brisk::one_shot_all_reduce", mutates_args=())
def one_shot_all_reduce(buffer: Tensor, x: Tensor, name: str) -> Tensor:
    """The sum over the ranks of a process group; `buffer` [bytes] is this rank's symmetric memory."""
    room = buffer[: x.nbytes].view(x.dtype).view(x.shape)
    return torch.ops.symm_mem.one_shot_all_reduce_copy(room, x, "sum", name)


one_shot_all_reduce.register_fake(lambda buffer, x, name: torch.empty_like(x))


class RowParallel(nn.Module):
    """A linear layer of which this rank has a slice of the inputs."""

    def __init__(self, linear: nn.Module, group: Group):
        super().__init__()
        self.linear, self.all_reduce = linear, group.all_reduce
        # Act-order takes its inputs from all ranks.
        ordered = getattr(linear, "order", None) is not None
        self.whole = Sliced(linear.in_features * group.size, group) if ordered else None

    def forward(self, x: Tensor) -> Tensor:
        return self.all_reduce(self.linear(x if self.whole is None else self.whole(x)))


class Sliced(nn.Module):
    """A last dimension of which each rank has a part: puts the parts together, or finds the best of them."""

    def __init__(self, size: int, group: Group):
        super().__init__()
        self.group, self.all_reduce, self.part = group, group.all_reduce, size // group.size
        # Tensors, not numbers: so all ranks compile the same code.
        rank = torch.tensor(group.rank, device=group.device)
        self.register_buffer("first", rank * self.part, persistent=False)
        self.register_buffer("mine", torch.arange(group.size, device=group.device) == rank, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., size / ranks] -> [..., size]."""
        return self.all_reduce(torch.where(self.mine[:, None], x[..., None, :], 0).flatten(-2))

    def best(self, value: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """The largest value of all ranks and its index, from those of this rank's part."""
        index = index + self.first
        # float32 counts to 2^24 only.
        found = torch.stack((value.float(), (index >> 16).float(), (index & 0xFFFF).float()), -1)
        value, high, low = self.all_reduce(torch.where(self.mine, found[..., None], 0)).unbind(-2)  # [..., ranks]
        rank = value.argmax(-1, keepdim=True)
        value, high, low = (part.gather(-1, rank)[..., 0] for part in (value, high, low))
        return value, (high.long() << 16) + low.long()

    def of_rank_0(self, tokens: Tensor) -> Tensor:
        """Rank 0's token ids, below 2^24."""
        return self.all_reduce(torch.where(self.mine[0], tokens, 0).float()).long()


class VocabParallelEmbedding(nn.Module):
    """Takes the place of model.Embedding, with the rows of this rank's part of the vocabulary."""

    def __init__(self, weight: nn.Parameter, group: Group):
        super().__init__()
        self.weight, self.all_reduce = weight, group.all_reduce
        first = torch.tensor(group.rank * len(weight), device=group.device)
        self.register_buffer("first", first, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        local = tokens - self.first
        mine = (local >= 0) & (local < len(self.weight))
        x = F.embedding(torch.where(mine, local, 0), self.weight)
        return self.all_reduce(torch.where(mine[..., None], x, 0))


# ---------------------------------------------------------------------------------------------------------------------
# Joining


@contextlib.contextmanager
def join(device: torch.device, backend: str = "auto") -> Iterator[Group]:
    """Meets the other ranks of a torchrun -> the group, for as long as the context lasts.

    Backends: NCCL on GPUs; on CPUs shared memory among the ranks of one machine, gloo otherwise. Only rank 0 has an
    output. When a rank fails or dies all end within seconds, each with an `error:` line.
    """
    size = world_size()
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
        take_cores(local_rank, on_this_machine)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"cannot reach the other ranks at {where} ({error}); check the address and start all"
        ) from error
    with Lifeline(store.clone(), rank, size), only_rank_0_speaks(rank):
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
    """UserError for one that can't be."""
    can_share = device.type == "cpu" and one_machine and hasattr(os, "memfd_create")
    if backend == "auto":
        if device.type == "cuda":
            backend = "nccl"
        else:
            backend = "shm" if can_share and kernels.cpu_library() is not None else "gloo"
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


def take_cores(local_rank: int, ranks: int) -> None:
    """Each rank of a machine computes on cores of its own."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0), key=place)
    count = len(cores) // ranks  # as many for each: the last bits of sums depend on the number of threads
    if own := cores[local_rank * count : (local_rank + 1) * count]:
        os.sched_setaffinity(0, own)
        if os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun sets it, where the user does not say more
            torch.set_num_threads(len({place(core)[:2] for core in own}))


def place(core: int) -> tuple[int, int, int]:
    """Where a logical core is: socket, physical core, itself."""
    topology = Path(f"/sys/devices/system/cpu/cpu{core}/topology")
    try:
        return *(int((topology / name).read_text()) for name in ("physical_package_id", "core_id")), core
    except OSError:
        return 0, core, core


def share_memory(store: dist.Store, rank: int, size: int) -> None:
    """Gives brisk::all_reduce a piece of memory that all ranks have mapped. It has no name, so none is left behind."""
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
    """Memory that the GPUs of one machine read from each other, where they can: for sums as small as a decode step's,
    which then take one kernel and no copies."""
    import torch.distributed._symmetric_memory as symmetric_memory

    buffer, peers = None, set(range(torch.cuda.device_count())) - {device.index}
    if all(torch.cuda.can_device_access_peer(device, peer) for peer in peers):
        with contextlib.suppress(RuntimeError):  # a driver or a link without it
            buffer = symmetric_memory.empty(SYMMETRIC_BYTES, dtype=torch.uint8, device=device)
    if all_have(buffer, device):
        try:
            symmetric_memory.rendezvous(buffer, dist.group.WORLD)
        except RuntimeError as error:
            log(f"no symmetric memory ({str(error).splitlines()[0]}); NCCL does all")
            buffer = None
        if all_have(buffer, device):
            return buffer
    return None


def all_have(buffer: Tensor | None, device: torch.device) -> bool:
    have = torch.tensor(buffer is not None, dtype=torch.int32, device=device)
    dist.all_reduce(have, dist.ReduceOp.MIN)
    return bool(have.item())


@contextlib.contextmanager
def only_rank_0_speaks(rank: int) -> Iterator[None]:
    """The other ranks' output goes nowhere, but for their errors."""
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
