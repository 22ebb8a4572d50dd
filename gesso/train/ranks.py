"""Ranks: processes that train one network together, started by torchrun; alone, rank 0 of 1."""

import contextlib
import datetime
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.tensor import DTensor

from gesso import torchrun
from gesso.config import Run
from gesso.errors import RunError, UsageError
from gesso.generate import device_of
from gesso.train.roll import Roll, of_others

MEETING = datetime.timedelta(seconds=60)
"""for ranks that are there to meet in another group"""


@dataclass(frozen=True)
class Ranks:
    """rank of world; `local` of `per_node` on this machine. names: of all ranks, with host and process."""

    rank: int = 0
    world: int = 1
    local: int = 0
    per_node: int = 1
    names: tuple[str, ...] = ("rank 0 of 1",)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Over all ranks."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gathered(self, value: float, device: torch.device) -> list[float]:
        """That of every rank."""
        values = torch.zeros(self.world, dtype=torch.float64, device=device)
        values[self.rank] = value
        return self.sum(values).tolist()

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world > 1:
            dist.barrier()

    def beside(self, seconds: float) -> dist.ProcessGroup | None:
        """A group of all ranks by itself (gloo): what a thread exchanges must not mix with what the step does."""
        if self.world == 1:
            return None
        # Whoever dies now, before it has met the others, is waited for; later its connection breaks.
        self.wait()
        group = dist.new_group(backend="gloo", timeout=MEETING)
        _set_pg_timeout(datetime.timedelta(seconds=seconds), group)
        return group

    def share(self, first: int, size: int) -> tuple[Tensor, Tensor]:
        """Counters of this rank's part of the batch first .. first + size - 1, and which of them count.

        All ranks have equally many, so that they keep step; where the world does not divide the batch, the last ones
        have copies that do not count.
        """
        n = -(-size // self.world)
        place = torch.arange(self.rank * n, (self.rank + 1) * n)
        return first + place.clamp(max=size - 1), place < size

    def mesh(self, sharding: str, device: torch.device) -> DeviceMesh:
        """Of fsdp one dimension; of hsdp nodes and the ranks of each."""
        self.wait()
        if sharding == "fsdp":
            return init_device_mesh(device.type, (self.world,))
        return init_device_mesh(
            device.type, (self.world // self.per_node, self.per_node), mesh_dim_names=("node", "rank")
        )


ALONE = Ranks()


def here() -> Ranks:
    """Of this process."""
    return Ranks(*torchrun.place())


@contextlib.contextmanager
def joined(run: Run) -> Iterator[tuple[Ranks, torch.device]]:
    """The ranks of this run, connected (NCCL between GPUs, gloo between CPUs), and this one's device.

    Raises UsageError where there are more ranks than images in a batch, or than GPUs. What torch.distributed raises when
    a rank is gone or late becomes a RunError that names it.
    """
    ranks = here()
    if ranks.world == 1:
        yield ranks, device_of(run)
        return
    if ranks.world > run.train.batch_size:
        raise UsageError(
            f"{ranks.world} ranks for train.batch_size={run.train.batch_size}: start fewer, or set it higher"
        )
    if run.train.sharding == "hsdp" and ranks.world % ranks.per_node:
        raise UsageError(
            f"train.sharding=hsdp: {ranks.world} ranks on nodes of {ranks.per_node}; start equally many on each"
        )
    device = device_of(run)
    if device.type == "cuda":
        if ranks.per_node > torch.cuda.device_count():
            raise UsageError(
                f"{ranks.per_node} ranks on this machine, which has {torch.cuda.device_count()} GPUs: "
                f"torchrun --nproc-per-node {torch.cuda.device_count()}"
            )
        device = torch.device("cuda", ranks.local)
        torch.cuda.set_device(device)
    ours = not dist.is_initialized()  # or by whoever calls gesso as a library
    if ours:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=datetime.timedelta(seconds=run.train.timeout),
            device_id=device if device.type == "cuda" else None,
        )
    roll = Roll(ranks.rank, ranks.world)
    ranks.wait()
    try:
        yield replace(ranks, names=tuple(map(roll.name, range(ranks.world)))), device
    except BaseException as error:
        if not of_others(error):
            roll.leave((str(error) or type(error).__name__).splitlines()[0])
            raise
        roll.leave("")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it at once to those that still have to speak
        raise RunError(
            f"{roll.missing()}\nGo on from the last state with --resume, on as many ranks as there are"
        ) from error
    finally:
        if ours:
            dist.destroy_process_group()


def own(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this rank holds, and of its gradient; the tensor itself where it is whole."""
    if not isinstance(tensor, DTensor):
        return tensor
    part = tensor.detach().to_local()
    part.grad = None if tensor.grad is None else tensor.grad.to_local()
    return part


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together; all ranks take part."""
    # Shards in the host's memory go back to where ranks exchange them.
    return tensor.to(tensor.device_mesh.device_type).full_tensor() if isinstance(tensor, DTensor) else tensor
