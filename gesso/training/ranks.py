"""Ranks: the processes that train one network together, started by torchrun; otherwise rank 0 of 1."""

import contextlib
import datetime
import gc
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.tensor import DTensor

from gesso import devices
from gesso.config import RunConfig
from gesso.errors import RunError, UsageError
from gesso.sampling import run_device
from gesso.training.failure_report import RankRegistry, is_peer_failure

RENDEZVOUS_TIMEOUT = datetime.timedelta(seconds=60)
"""Time for all ranks to join a new process group."""


@dataclass(frozen=True)
class Ranks:
    """Index of this rank among all ranks and on this machine, and a name with host and process for every rank."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    names: tuple[str, ...] = ("rank 0 of 1",)

    @property
    def is_main(self) -> bool:
        """Return True on rank 0."""
        return self.rank == 0

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def all_gather(self, value: float, device: torch.device) -> list[float]:
        """Return the values of all ranks."""
        values = torch.zeros(self.world_size, dtype=torch.float64, device=device)
        values[self.rank] = value
        return self.all_reduce(values).tolist()

    def barrier(self, group: dist.ProcessGroup | None = None) -> None:
        """Wait for all ranks, in `group` or else in the default process group."""
        if self.world_size > 1:
            dist.barrier(group=group)

    def new_gloo_group(self, timeout_s: float) -> dist.ProcessGroup | None:
        """Return a separate gloo group of all ranks for a background thread; None for a single rank."""
        if self.world_size == 1:
            return None
        # A rank that dies before it joins breaks no connection: the others wait until the rendezvous times out.
        self.barrier()
        group = dist.new_group(backend="gloo", timeout=RENDEZVOUS_TIMEOUT)
        _set_pg_timeout(datetime.timedelta(seconds=timeout_s), group)
        return group

    def shard_batch(self, start: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Return this rank's part of the batch that begins at sample index `start`.

        All parts have n = ceil(batch_size / world_size) samples. If that exceeds the batch, the last parts are filled
        with copies of the last sample, which are not valid.

        Returns:
            Sample indices (n,) int64, and which of them are valid (n,) bool.
        """
        n = -(-batch_size // self.world_size)
        position = torch.arange(self.rank * n, (self.rank + 1) * n)
        return start + position.clamp(max=batch_size - 1), position < batch_size

    def build_mesh(self, sharding: str, device: torch.device) -> DeviceMesh:
        """Return the device mesh: one dimension for fsdp; nodes and the ranks of a node for hsdp."""
        self.barrier()
        if sharding == "fsdp":
            return init_device_mesh(device.type, (self.world_size,))
        return init_device_mesh(
            device.type,
            (self.world_size // self.local_world_size, self.local_world_size),
            mesh_dim_names=("node", "rank"),
        )


SINGLE_PROCESS = Ranks()


@contextlib.contextmanager
def init_distributed(run: RunConfig) -> Iterator[tuple[Ranks, torch.device]]:
    """Connect the ranks of this run (NCCL between GPUs, gloo between CPUs); yield them and this rank's device.

    A process group that the caller has already initialized is used and left open.

    Raises:
        UsageError: There are more ranks than images in a batch, or than GPUs.
        RunError: Another rank failed or did not answer in time; the message names it.
    """
    ranks = Ranks(*devices.rank_from_env())
    if ranks.world_size == 1:
        yield ranks, run_device(run)
        return
    device = _select_device(run, ranks)
    owns_group = not dist.is_initialized()
    if owns_group:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=datetime.timedelta(seconds=run.train.rank_timeout_s),
            device_id=device if device.type == "cuda" else None,
        )
    registry = RankRegistry(ranks.rank, ranks.world_size)
    ranks.barrier()
    try:
        yield replace(ranks, names=tuple(map(registry.describe, range(ranks.world_size)))), device
    except BaseException as error:
        if not is_peer_failure(error):
            registry.report_exit((str(error) or type(error).__name__).splitlines()[0])
            raise
        registry.report_exit("")
        # torchrun sends SIGTERM to the remaining ranks immediately, but they must still report what failed.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise RunError(
            f"{registry.failed_ranks()}\nResume from the last checkpoint with --resume; the number of ranks may change"
        ) from error
    finally:
        if owns_group:
            # DDP modules in reference cycles hold the process group. Its threads must end before the interpreter:
            # a gloo thread that waits for the GIL during finalization aborts the process.
            gc.collect()
            dist.destroy_process_group()


def _select_device(run: RunConfig, ranks: Ranks) -> torch.device:
    """Return the device of this rank. Raises UsageError if the settings or the machine cannot serve all ranks."""
    if ranks.world_size > run.train.batch_size:
        raise UsageError(
            f"{ranks.world_size} ranks, but train.batch_size={run.train.batch_size}: start fewer ranks, or increase "
            "train.batch_size"
        )
    if run.train.sharding == "hsdp" and ranks.world_size % ranks.local_world_size:
        raise UsageError(
            f"train.sharding=hsdp: {ranks.world_size} ranks cannot be divided into nodes of {ranks.local_world_size}; "
            "start the same number of ranks on each node"
        )
    device = run_device(run)
    if device.type != "cuda":
        return device
    if ranks.local_world_size > torch.cuda.device_count():
        raise UsageError(
            f"{ranks.local_world_size} ranks on this machine, which has {torch.cuda.device_count()} GPUs: use "
            f"torchrun --nproc-per-node {torch.cuda.device_count()}"
        )
    device = torch.device("cuda", ranks.local_rank)
    torch.cuda.set_device(device)
    return device


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, with its gradient; other tensors unchanged."""
    if not isinstance(tensor, DTensor):
        return tensor
    shard = cast(DTensor, tensor.detach()).to_local()
    shard.grad = None if tensor.grad is None else cast(DTensor, tensor.grad).to_local()
    return shard
