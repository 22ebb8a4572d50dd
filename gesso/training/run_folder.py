"""Open a run folder, new or resumed; an existing run is never overwritten."""

import contextlib
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from rich.console import Console

import gesso
from gesso import atomic_io, config, devices
from gesso.config import DataConfig, RunConfig
from gesso.data.base import Dataset
from gesso.data.encoders import text
from gesso.data.factory import is_cache_uri, open_dataset, with_dataset_info
from gesso.errors import UsageError
from gesso.evaluation import validation
from gesso.sampling import check_sampling
from gesso.training import checkpoint, loop, optimizer, trackers, transfer, transfer_config
from gesso.training import init_source as sources
from gesso.training.logging import ProgressBar
from gesso.training.ranks import SINGLE_PROCESS, Ranks, init_distributed

MAX_CHECKED_CAPTIONS = 100_000
"""Number of captions checked for truncation."""


def default_run_folder(name: str, run: RunConfig, resume: bool) -> Path:
    """Return runs/RECIPE, runs/NAME for a folder of images, or a folder next to a run.yaml that is repeated."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_dir():
        origin = path if path.is_dir() else path.parent
        if resume or not (origin / "run.yaml").exists():
            return origin
        return next(p for i in range(2, 10_000) if not (p := origin.with_name(f"{origin.name}-{i}")).exists())
    source = run.data.source
    return Path("runs") / (Path(source).resolve().name if run.recipe == "folder" and source else run.recipe)


def git_commit() -> str:
    """Return the git commit of the gesso checkout, with + if it has changes; "none" outside of one."""
    here = Path(gesso.__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", str(here)) else "")
    except (OSError, subprocess.CalledProcessError):
        return "none"


def environment(device: torch.device, ranks: Ranks = SINGLE_PROCESS) -> dict[str, str | int]:
    """Return versions and devices, which influence the last bits of the result."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "gesso": gesso.__version__,
        "commit": git_commit(),
        "torch": torch.__version__,
        "device": name,
        "threads": torch.get_num_threads(),
        "ranks": ranks.world_size,
    }


def open_dataset_for_run(run: RunConfig, console: Console) -> tuple[RunConfig, Dataset]:
    """Open the images and record what they and the text encoder determine in the run; validate the result."""
    check_sampling(run)
    trackers.check_trackers(run)
    widths: Mapping[str, int | None] = (
        {} if is_cache_uri(run.data.source) else text.text_dims(run.semantic)
    )  # before any image is read
    with ProgressBar(console, 1, 0, f"reading {run.data.source}") as bar:
        dataset = open_dataset(run.data, run.latent, run.train.seed, lambda done, total: bar.update(done, total=total))
    for note in dataset.notes:
        console.print(f"note: {note}", highlight=False)
    for name, reason in dataset.unreadable[:10]:
        console.print(f"left out: {name} ({reason})", highlight=False, markup=False)
    run = _apply_dataset_settings(run, dataset, console)
    widths = widths or _use_stored_text(run, dataset, console) or text.text_dims(run.semantic)
    if dataset.text_config is None:
        _check_captions(run, dataset, console)
    has_semantic = run.semantic.kind == "text" or (run.semantic.kind == "label" and dataset.class_names)
    tree = config.to_dict(run)
    data = with_dataset_info(run.data, dataset, run.latent, run.train.seed)
    tree["data"] = config.to_dict(run.model_copy(update={"data": data}))["data"]
    tree["semantic"] |= widths
    if not has_semantic and run.sample.guidance != 1 and run.sample.guide_run is None:
        tree["sample"]["guidance"] = 1.0
        console.print("note: sample.guidance=1, as there are no classes to guide towards", highlight=False)
    return config.validate(tree), dataset


def _apply_dataset_settings(run: RunConfig, dataset: Dataset, console: Console) -> RunConfig:
    """Return the run with the settings that its images determine; print a note for each overridden setting.

    Raises:
        UsageError: The images were prepared with another data.resize.
    """
    tree = config.to_dict(run)
    for block, fields in dataset.implied_settings(run).items():
        for name, value in fields.items():
            if name == "resize" and tree[block][name] not in (DataConfig().resize, value):
                raise UsageError(
                    f"data.resize={tree[block][name]}, but {run.data.source} was written with {value}: write it anew "
                    "with "
                    f"gesso cache --resize {tree[block][name]}, or set data.resize={value}"
                )
            if tree[block][name] not in (None, value):
                console.print(
                    f"note: {block}.{name}={value} (not {tree[block][name]}), as {run.data.source} holds",
                    highlight=False, markup=False,
                )  # fmt: skip
            tree[block][name] = value
    return config.validate(tree)


def _use_stored_text(run: RunConfig, dataset: Dataset, console: Console) -> dict[str, int | None]:
    """Return the dimensions of the text tokens in the data set; tokens of another encoder are ignored with a note."""
    configured, stored = run.semantic, dataset.text_config
    if configured.kind != "text" or stored is None:
        return {}
    widths = {"embed_dim": stored.embed_dim, "pooled_dim": stored.pooled_dim}
    same = (configured.encoder, configured.max_tokens) == (stored.encoder, stored.max_tokens)
    if same and all(getattr(configured, name) in (None, width) for name, width in widths.items()):
        return widths
    dataset.text_config = None
    console.print(
        f"note: captions are encoded by {configured.encoder}, {configured.max_tokens} tokens; for the tokens that "
        f"{run.data.source} keeps "
        f"set semantic.encoder={stored.encoder} semantic.max_tokens={stored.max_tokens}",
        highlight=False, markup=False,
    )  # fmt: skip
    return {}


def _check_captions(run: RunConfig, dataset: Dataset, console: Console) -> None:
    """Print how many captions are truncated, with examples. Raises UsageError if there are no captions."""
    if run.semantic.kind != "text":
        return
    if not any(dataset.captions):
        raise UsageError(
            f"semantic.kind=text: {run.data.source} has no captions; put image.txt beside each image, "
            "or set semantic.kind=none"
        )
    some = dataset.captions[:MAX_CHECKED_CAPTIONS]
    if cut := text.build_text_encoder(run.semantic).truncation_notes(some):
        of = f"{len(some):,}" if len(some) == len(dataset) else f"the first {len(some):,}"
        console.print(
            f"note: {len(cut):,} of {of} captions are longer than semantic.max_tokens={run.semantic.max_tokens}, "
            f"such as {cut[0]}",
            highlight=False, markup=False,
        )  # fmt: skip


RESUMABLE_SETTINGS = (
    "environment", "init.path", "train.device", "train.num_threads", "train.sharding", "train.micro_batch_size",
    "train.activation_checkpointing", "train.compile", "train.rank_timeout_s", "train.keep_checkpoints",
    "train.milestone_every", "train.deterministic", "train.tf32", "monitor.", "ema.device",
)  # fmt: skip
"""Settings that may change when a run is resumed: they change its result by rounding only."""


def prepare_run_folder(out: Path, run: RunConfig, device: torch.device, ranks: Ranks = SINGLE_PROCESS) -> RunConfig:
    """Return the run to train: `run` in a new folder, or the recorded one when resuming.

    Raises:
        UsageError: The folder holds another run, or other files.
    """
    record = out / "run.yaml"
    if not record.exists():
        strangers = [p.name for p in out.iterdir() if not p.name.startswith(".")]
        if strangers:
            raise UsageError(f"{out} holds other files ({', '.join(strangers[:3])}) and no run; choose another --out")
        run = run.model_copy(update={"environment": environment(device, ranks)})
        config.save_config(run, record)
        return run
    recorded = config.load_config(record)
    differing = [d for d in config.differences(recorded, run) if not d[0].startswith(RESUMABLE_SETTINGS)]
    if differing:
        shown = "\n".join(f"  {path}: {old!r} there, {new!r} here" for path, old, new in differing[:8])
        raise UsageError(
            f"{out} holds another run, which cannot be resumed with these settings:\n{shown}\nChoose another --out."
        )
    return run.model_copy(update={"environment": recorded.environment})


def start_training(run: RunConfig, out: Path, resume: bool, console: Console, log: Callable[[str], None]) -> RunConfig:
    """Open the data and the run folder and train, on every rank; only the first prints. Returns the recorded run."""
    configure_backends(run)
    with init_distributed(run) as (ranks, device):
        devices.check_precision(device, "train.precision", run.train.precision)
        if not ranks.is_main:
            console, log = Console(quiet=True), lambda text: None
        already = (out / "run.yaml").exists()
        ranks.barrier()  # before the first one writes it
        if already and not resume:
            raise UsageError(f"{out} already holds a run: go on with --resume, or choose another --out")
        if already:
            run = transfer_config.restore_recorded_settings(run, config.load_config(out / "run.yaml"))
        # Once there is a state, the source is not needed any more.
        begins = run.init.source is not None and not checkpoint.list_checkpoints(out / "state")
        source = sources.open_init_source(run) if begins else None  # before any image is read
        run, dataset = open_dataset_for_run(run, console)
        if run.monitor.validate_every:
            validation.open_validation_set(run, dataset)  # raises before the folder is a run
        optimizer.check_optimizer_config(run)
        with atomic_io.lock_dir(out) if ranks.is_main else contextlib.nullcontext():
            if ranks.is_main:
                for folder in (out, out / "state", out / "snapshots"):
                    atomic_io.remove_leftovers(folder)
            run, denoiser, account = transfer.init_from_source(run, source) if source else (run, None, [])
            check_sampling(run)  # once more, as the source may have brought its process
            source = None
            if ranks.is_main:
                run = prepare_run_folder(out, run, device, ranks)
            ranks.barrier()
            run = prepare_run_folder(out, run, device, ranks)
            now = environment(device, ranks)
            changed = [
                f"{k} {run.environment.get(k)} -> {v}"
                for k, v in now.items()
                if k not in ("gesso", "commit") and run.environment.get(k) != v
            ]
            if already and changed:
                log(f"note: {'; '.join(changed)}: the result will agree closely, not to the last bit")
            for line in account:
                log(line)
            if account and ranks.is_main:
                atomic_io.write_text(out / "transfer.txt", "\n".join(account) + "\n")
            over = f", {ranks.world_size} ranks ({run.train.sharding})" if ranks.world_size > 1 else ""
            log(f"training in {out}: {len(dataset):,} images, {run.net.name}, {run.process.name}{over}")
            loop.train(run, dataset, out, console, ranks, device, denoiser)
    return run


def configure_backends(run: RunConfig) -> None:
    """Set the process-wide options of torch that the run selects."""
    if run.train.num_threads:
        torch.set_num_threads(run.train.num_threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = run.train.tf32
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False  # as EDM2's published loop
    if run.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
