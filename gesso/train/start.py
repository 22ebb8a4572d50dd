"""Opening a run folder: new, or resumed; never overwritten."""

import contextlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

import gesso
from gesso import config, devices, files
from gesso.config import Data, Run
from gesso.data import text
from gesso.data.dataset import described, is_cached, open_dataset
from gesso.data.samples import Dataset
from gesso.errors import UsageError
from gesso.evaluate import validation
from gesso.generate import check
from gesso.train import checkpoint, loop, optim, settle, trackers, transfer
from gesso.train import source as sources
from gesso.train.log import Bar
from gesso.train.ranks import ALONE, Ranks, joined

CUT = 100_000
"""captions that are looked through for long ones"""


def default_out(name: str, run: Run, resume: bool) -> Path:
    """runs/RECIPE; runs/NAME for a folder of images; beside the original for a repeated run.yaml."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_dir():
        origin = path if path.is_dir() else path.parent
        if resume or not (origin / "run.yaml").exists():
            return origin
        return next(p for i in range(2, 10_000) if not (p := origin.with_name(f"{origin.name}-{i}")).exists())
    source = run.data.source
    return Path("runs") / (Path(source).resolve().name if run.recipe == "folder" and source else run.recipe)


def commit() -> str:
    """The git commit of the gesso checkout in use, with + when there are changes; 'none' elsewhere."""
    here = Path(gesso.__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", str(here)) else "")
    except (OSError, subprocess.CalledProcessError):
        return "none"


def made_with(device: torch.device, ranks: Ranks = ALONE) -> dict[str, str | int]:
    """What decides the last bits besides the settings."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "gesso": gesso.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "device": name,
        "threads": torch.get_num_threads(),
        "ranks": ranks.world,
    }


def opened(run: Run, console: Console) -> tuple[Run, Dataset]:
    """Open the images and complete the run with what they and the text encoder tell; check again that it all fits."""
    check(run)
    trackers.check(run)
    widths = {} if is_cached(run.data.source) else text.widths(run.semantic)  # before any image is read
    with Bar(console, 1, 0, f"reading {run.data.source}") as bar:
        dataset = open_dataset(run.data, run.latent, run.train.seed, lambda done, total: bar.update(done, total=total))
    for note in dataset.notes:
        console.print(f"note: {note}", highlight=False)
    for name, reason in dataset.unreadable[:10]:
        console.print(f"left out: {name} ({reason})", highlight=False, markup=False)
    run = _settled(run, dataset, console)
    widths = widths or _encoded(run, dataset, console) or text.widths(run.semantic)
    if dataset.encoded is None:
        _captions(run, dataset, console)
    told = run.semantic.kind == "text" or (run.semantic.kind == "label" and dataset.class_names)
    tree = config.as_tree(run)
    data = described(run.data, dataset, run.latent, run.train.seed)
    tree["data"] = config.as_tree(run.model_copy(update={"data": data}))["data"]
    tree["semantic"] |= widths
    if not told and run.sample.guidance != 1 and run.sample.guide is None:
        tree["sample"]["guidance"] = 1.0
        console.print("note: sample.guidance=1, as there are no classes to guide towards", highlight=False)
    return config.validate(tree), dataset


def _settled(run: Run, dataset: Dataset, console: Console) -> Run:
    """The run with what its images settle, and a note for what it said otherwise. Raises UsageError for another data.resize."""
    tree = config.as_tree(run)
    for block, fields in dataset.settled(run).items():
        for name, value in fields.items():
            if name == "resize" and tree[block][name] not in (Data().resize, value):
                raise UsageError(
                    f"data.resize={tree[block][name]}, but {run.data.source} was written with {value}: write it anew with "
                    f"gesso cache --resize {tree[block][name]}, or set data.resize={value}"
                )
            if tree[block][name] not in (None, value):
                console.print(
                    f"note: {block}.{name}={value} (not {tree[block][name]}), as {run.data.source} holds",
                    highlight=False, markup=False,
                )  # fmt: skip
            tree[block][name] = value
    return config.validate(tree)


def _encoded(run: Run, dataset: Dataset, console: Console) -> dict[str, int]:
    """Widths of the tokens that the data set keeps. Where they are of another encoder, they are left aside, with a note."""
    ours, theirs = run.semantic, dataset.encoded
    if ours.kind != "text" or theirs is None:
        return {}
    widths = {"width": theirs.width, "pooled_width": theirs.pooled_width}
    same = (ours.encoder, ours.tokens) == (theirs.encoder, theirs.tokens)
    if same and all(getattr(ours, name) in (None, width) for name, width in widths.items()):
        return widths
    dataset.encoded = None
    console.print(
        f"note: captions are encoded by {ours.encoder}, {ours.tokens} tokens; for the tokens that {run.data.source} keeps "
        f"set semantic.encoder={theirs.encoder} semantic.tokens={theirs.tokens}",
        highlight=False, markup=False,
    )  # fmt: skip
    return {}


def _captions(run: Run, dataset: Dataset, console: Console) -> None:
    """Say how many captions are cut, and which. Raises UsageError when there are no words to learn."""
    if run.semantic.kind != "text":
        return
    if not any(dataset.captions):
        raise UsageError(
            f"semantic.kind=text: {run.data.source} has no captions; put image.txt beside each image, "
            "or set semantic.kind=none"
        )
    some = dataset.captions[:CUT]
    if cut := text.build(run.semantic).cut(some):
        of = f"{len(some):,}" if len(some) == len(dataset) else f"the first {len(some):,}"
        console.print(
            f"note: {len(cut):,} of {of} captions are longer than semantic.tokens={run.semantic.tokens}, "
            f"such as {cut[0]}",
            highlight=False, markup=False,
        )  # fmt: skip


HOW = ("made_with", "init.file", "train.device", "train.threads", "train.sharding", "train.micro_batch", "train.recompute", "train.compile",
       "train.timeout", "train.keep_states", "train.milestone_images", "train.deterministic", "train.tf32", "watch.", "ema.device")  # fmt: skip
"""settings that may change when a run goes on: they do not change what it computes, but for rounding"""


def prepare(out: Path, run: Run, device: torch.device, ranks: Ranks = ALONE) -> Run:
    """The run to go on with: `run` in a new folder, the recorded one, as it is computed now, when resuming.

    Raises UsageError when the folder holds another run, or other things.
    """
    record = out / "run.yaml"
    if not record.exists():
        strangers = [p.name for p in out.iterdir() if not p.name.startswith(".")]
        if strangers:
            raise UsageError(f"{out} holds other files ({', '.join(strangers[:3])}) and no run; choose another --out")
        run = run.model_copy(update={"made_with": made_with(device, ranks)})
        config.write(run, record)
        return run
    recorded = config.read(record)
    differing = [d for d in config.differences(recorded, run) if not d[0].startswith(HOW)]
    if differing:
        shown = "\n".join(f"  {path}: {old!r} there, {new!r} here" for path, old, new in differing[:8])
        raise UsageError(
            f"{out} holds another run, which cannot be resumed with these settings:\n{shown}\nChoose another --out."
        )
    return run.model_copy(update={"made_with": recorded.made_with})


def start(run: Run, out: Path, resume: bool, console: Console, say: Callable[[str], None]) -> Run:
    """Open the data and the folder and train, on every rank; the first one speaks. Returns the run as it was recorded."""
    exactly(run)
    with joined(run) as (ranks, device):
        devices.check_precision(device, "train.precision", run.train.precision)
        if not ranks.main:
            console, say = Console(quiet=True), lambda text: None
        already = (out / "run.yaml").exists()
        ranks.wait()  # before the first one writes it
        if already and not resume:
            raise UsageError(f"{out} already holds a run: go on with --resume, or choose another --out")
        if already:
            run = settle.recalled(run, config.read(out / "run.yaml"))
        # Once there is a state, the source is not needed any more.
        begins = run.init.source is not None and not checkpoint.stored(out / "state")
        source = sources.opened(run) if begins else None  # before any image is read
        run, dataset = opened(run, console)
        if run.watch.validate_images:
            validation.images(run, dataset)  # raises before the folder is a run
        optim.check(run)
        with files.locked(out) if ranks.main else contextlib.nullcontext():
            if ranks.main:
                for folder in (out, out / "state", out / "snapshots"):
                    files.sweep(folder)
            run, denoiser, account = transfer.begun(run, source) if source else (run, None, [])
            check(run)  # once more, as the source may have brought its process
            source = None
            if ranks.main:
                run = prepare(out, run, device, ranks)
            ranks.wait()
            run = prepare(out, run, device, ranks)
            now = made_with(device, ranks)
            changed = [
                f"{k} {run.made_with.get(k)} -> {v}"
                for k, v in now.items()
                if k not in ("gesso", "commit") and run.made_with.get(k) != v
            ]
            if already and changed:
                say(f"note: {'; '.join(changed)}: the result will agree closely, not to the last bit")
            for line in account:
                say(line)
            if account and ranks.main:
                files.write_text(out / "transfer.txt", "\n".join(account) + "\n")
            over = f", {ranks.world} ranks ({run.train.sharding})" if ranks.world > 1 else ""
            say(f"training in {out}: {len(dataset):,} images, {run.net.name}, {run.process.name}{over}")
            loop.train(run, dataset, out, console, ranks, device, denoiser)
    return run


def exactly(run: Run) -> None:
    """Process-wide switches of torch."""
    if run.train.threads:
        torch.set_num_threads(run.train.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = run.train.tf32
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False  # as EDM2's published loop
    if run.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
