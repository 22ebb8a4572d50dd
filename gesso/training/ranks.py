"""Ranks: processes that train one network together, started by torchrun; otherwise rank 0 of 1."""

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

from gesso import torchrun
from gesso.config import RunConfig
from gesso.errors import RunError, UsageError
from gesso.sampling import run_device
from gesso.training.failure_report import RankRegistry, is_peer_failure

RENDEZVOUS_TIMEOUT = datetime.timedelta(seconds=60)
"""Time for all ranks to join another group."""


@dataclass(frozen=True)
class Ranks:
    """This rank, its index on this machine, and the names of all ranks with host and process."""

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

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def new_gloo_group(self, timeout_s: float) -> dist.ProcessGroup | None:
        """Return a separate gloo group of all ranks for use in a thread, apart from the communication of the step."""
        if self.world_size == 1:
            return None
        # Whoever dies now, before it has met the others, is waited for; later its connection breaks.
        self.barrier()
        group = dist.new_group(backend="gloo", timeout=RENDEZVOUS_TIMEOUT)
        _set_pg_timeout(datetime.timedelta(seconds=timeout_s), group)
        return group

    def shard_batch(self, start: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Return the sample indices of this rank's part of the batch from `start`, and which of them count.

        All ranks have the same number; if the batch is not divisible, the last ranks have copies that do not count.
        """
        n = -(-batch_size // self.world_size)
        place = torch.arange(self.rank * n, (self.rank + 1) * n)
        return start + place.clamp(max=batch_size - 1), place < batch_size

    def build_mesh(self, sharding: str, device: torch.device) -> DeviceMesh:
        """Return a device mesh: one dimension for fsdp; nodes and ranks of a node for hsdp."""
        self.barrier()
        if sharding == "fsdp":
            return init_device_mesh(device.type, (self.world_size,))
        return init_device_mesh(
            device.type,
            (self.world_size // self.local_world_size, self.local_world_size),
            mesh_dim_names=("node", "rank"),
        )


SINGLE_PROCESS = Ranks()


def from_env() -> Ranks:
    """Return the ranks by the environment variables of torchrun."""
    return Ranks(*torchrun.rank_from_env())


@contextlib.contextmanager
def init_distributed(run: RunConfig) -> Iterator[tuple[Ranks, torch.device]]:
    """Connect the ranks of this run (NCCL between GPUs, gloo between CPUs); yield them and this rank's device.

    Errors of torch.distributed because a rank is gone or late become a RunError that names the rank.

    Raises:
        UsageError: There are more ranks than images in a batch, or than GPUs.
    """
    ranks = from_env()
    if ranks.world_size == 1:
        yield ranks, run_device(run)
        return
    if ranks.world_size > run.train.batch_size:
        raise UsageError(
            f"{ranks.world_size} ranks for train.batch_size={run.train.batch_size}: start fewer, or set it higher"
        )
    if run.train.sharding == "hsdp" and ranks.world_size % ranks.local_world_size:
        raise UsageError(
            f"train.sharding=hsdp: {ranks.world_size} ranks on nodes of {ranks.local_world_size}; start equally many "
            "on each"
        )
    device = run_device(run)
    if device.type == "cuda":
        if ranks.local_world_size > torch.cuda.device_count():
            raise UsageError(
                f"{ranks.local_world_size} ranks on this machine, which has {torch.cuda.device_count()} GPUs: "
                f"torchrun --nproc-per-node {torch.cuda.device_count()}"
            )
        device = torch.device("cuda", ranks.local_rank)
        torch.cuda.set_device(device)
    ours = not dist.is_initialized()  # or by whoever calls gesso as a library
    if ours:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=datetime.timedelta(seconds=run.train.rank_timeout_s),
            device_id=device if device.type == "cuda" else None,
        )
    roll = RankRegistry(ranks.rank, ranks.world_size)
    ranks.barrier()
    try:
        yield replace(ranks, names=tuple(map(roll.describe, range(ranks.world_size)))), device
    except BaseException as error:
        if not is_peer_failure(error):
            roll.report_exit((str(error) or type(error).__name__).splitlines()[0])
            raise
        roll.report_exit("")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it at once to those that still have to speak
        raise RunError(
            f"{roll.failed_ranks()}\nGo on from the last state with --resume, on as many ranks as there are"
        ) from error
    finally:
        if ours:
            # DDP modules in reference cycles hold the process group. Its threads must end before the interpreter:
            # a gloo thread that waits for the GIL during finalization aborts the process.
            gc.collect()
            dist.destroy_process_group()


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, with its gradient; other tensors unchanged."""
    if not isinstance(tensor, DTensor):
        return tensor
    part = cast(DTensor, tensor.detach()).to_local()
    part.grad = None if tensor.grad is None else cast(DTensor, tensor.grad).to_local()
    return part
