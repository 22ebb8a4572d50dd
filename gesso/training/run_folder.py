"""Open a run folder, new or resumed; an existing run is never overwritten."""

import contextlib
import os
import shlex
import subprocess
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console

import gesso
from gesso import atomic_io, config, devices, extensions
from gesso.config import DataConfig, RunConfig
from gesso.data.base import Dataset
from gesso.data.encoders import text
from gesso.data.factory import is_cache_uri, is_named_source, open_dataset, with_dataset_info
from gesso.errors import UsageError
from gesso.evaluation import validation
from gesso.sampling import check_sampling
from gesso.training import checkpoint, init_source, loop, optimizer, trackers, transfer, transfer_config
from gesso.training.logging import ProgressBar
from gesso.training.ranks import SINGLE_PROCESS, Ranks, init_distributed
from gesso.untrusted import print_text

MAX_CHECKED_CAPTIONS = 100_000
"""Number of captions checked for truncation."""


def default_run_folder(name: str, run: RunConfig, resume: bool) -> Path:
    """Return the folder of a run without --out.

    It is runs/RECIPE, or runs/NAME for a folder of images. A run.yaml or run folder given as recipe is resumed in its
    own folder, and otherwise repeated in a new folder next to it.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_dir():
        origin = path if path.is_dir() else path.parent
        if resume or not (origin / "run.yaml").exists():
            return origin
        return next(p for i in range(2, 10_000) if not (p := origin.with_name(f"{origin.name}-{i}")).exists())
    source = run.data.source
    return Path("runs") / (Path(source).resolve().name if run.recipe == "folder" and source else run.recipe)


def git_commit() -> str:
    """Return the git commit of the gesso checkout, with + if it has uncommitted changes; "none" without a checkout."""
    package_dir = Path(gesso.__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.check_output(
            ["git", *arguments], cwd=package_dir, text=True, stderr=subprocess.DEVNULL
        ).strip()

    try:
        commit, changes = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain", "--", str(package_dir))
        return commit + ("+" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "none"


def environment(device: torch.device, ranks: Ranks = SINGLE_PROCESS) -> dict[str, str | int]:
    """Return the versions, device, threads and ranks of this process, which influence the last bits of the result."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    code = extensions.describe_sources()
    return {
        "gesso": gesso.__version__,
        "commit": git_commit(),
        "torch": torch.__version__,
        "device": name,
        "threads": torch.get_num_threads(),
        "ranks": ranks.world_size,
        **({"code": code} if code else {}),
    }


def open_dataset_for_run(run: RunConfig, console: Console) -> tuple[RunConfig, Dataset]:
    """Return the run with the settings that its images and text encoder determine, and the data set.

    Raises:
        UsageError: Settings contradict the images, or a library or the text encoder is missing.
    """
    check_sampling(run)
    trackers.check_trackers(run)
    # Text encoders are checked before any image is read. A cache may contain tokens that need no encoder.
    text_dims: Mapping[str, int | None] = {} if is_cache_uri(run.data.source) else text.text_dims(run.semantic)
    with ProgressBar(console, 1, 0, f"reading {run.data.source}") as bar:
        dataset = open_dataset(run.data, run.latent, run.train.seed, lambda done, total: bar.update(done, total=total))
    for note in dataset.notes:
        print_text(console, f"note: {note}")
    for name, reason in dataset.unreadable[:10]:
        print_text(console, f"left out: {name} ({reason})")
    run = _apply_dataset_settings(run, dataset, console)
    text_dims = text_dims or _use_stored_text(run, dataset, console) or text.text_dims(run.semantic)
    if dataset.text_config is None:
        _check_captions(run, dataset, console)
    has_semantic = run.semantic.kind == "text" or (run.semantic.kind == "label" and dataset.class_names)
    tree = config.to_dict(run)
    data = with_dataset_info(run.data, dataset, run.latent, run.train.seed)
    tree["data"] = config.to_dict(run.model_copy(update={"data": data}))["data"]
    tree["semantic"] |= text_dims
    if data.untrained_classes and run.semantic.kind == "label":
        _print_untrained_classes(data, console)
    if not has_semantic and run.sample.guidance != 1 and run.sample.guide_run is None:
        tree["sample"]["guidance"] = 1.0
        print_text(console, "note: sample.guidance=1, because the images have no classes")
    return config.validate(tree), dataset


def _print_untrained_classes(data: DataConfig, console: Console) -> None:
    classes, names = data.untrained_classes or (), data.class_names or ()
    examples = ", ".join(f"{names[i]!r} ({i})" for i in classes[:5]) + ", ..." * (len(classes) > 5)
    console.print(
        f"note: {len(classes):,} of {len(names):,} classes {'has' if len(classes) == 1 else 'have'} no images: "
        f"{examples}. Samples do not show them unless --label names them",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


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
                    f"data.resize={tree[block][name]}, but {run.data.source} was written with {value}: write it again "
                    f"with gesso cache --resize {tree[block][name]}, or set data.resize={value}"
                )
            if tree[block][name] not in (None, value):
                print_text(
                    console,
                    f"note: {block}.{name}={value} (not {tree[block][name]}), as in {run.data.source}",
                )
            tree[block][name] = value
    return config.validate(tree)


def _use_stored_text(run: RunConfig, dataset: Dataset, console: Console) -> dict[str, int | None]:
    """Return the dimensions of the text tokens in the data set. Tokens of another encoder are ignored with a note."""
    configured, stored = run.semantic, dataset.text_config
    if configured.kind != "text" or stored is None:
        return {}
    dims = {"embed_dim": stored.embed_dim, "pooled_dim": stored.pooled_dim}
    same_encoder = (configured.encoder, configured.max_tokens) == (stored.encoder, stored.max_tokens)
    if same_encoder and all(getattr(configured, name) in (None, dim) for name, dim in dims.items()):
        return dims
    dataset.text_config = None
    print_text(
        console,
        f"note: captions are encoded by {configured.encoder}, {configured.max_tokens} tokens; to use the tokens in "
        f"{run.data.source}, set semantic.encoder={stored.encoder} semantic.max_tokens={stored.max_tokens}",
    )
    return {}


def _check_captions(run: RunConfig, dataset: Dataset, console: Console) -> None:
    """Print how many captions are truncated, with examples. Raises UsageError if there are no captions."""
    if run.semantic.kind != "text":
        return
    if not any(dataset.captions):
        raise UsageError(
            f"semantic.kind=text: {run.data.source} has no captions; put image.txt next to each image, "
            "or set semantic.kind=none"
        )
    captions = dataset.captions[:MAX_CHECKED_CAPTIONS]
    if truncated := text.build_text_encoder(run.semantic).truncation_notes(captions):
        first = "" if len(captions) == len(dataset) else "the first "
        print_text(
            console,
            f"note: {len(truncated):,} of {first}{len(captions):,} captions are longer than "
            f"semantic.max_tokens={run.semantic.max_tokens}, such as {truncated[0]}",
        )


PATH_SETTINGS = (
    "data.source", "latent.vae", "semantic.encoder", "init.source", "sample.guide_run", "monitor.validation_source",
    "eval.validation_source", "eval.reference", "eval.prompts", "eval.weights_dir", "eval.dinov2", "eval.clip",
)  # fmt: skip
"""Settings that may be a local path."""


def with_absolute_paths(run: RunConfig, recorded: RunConfig | None = None) -> RunConfig:
    """Return the run with absolute paths in place of relative ones, so that it can be used from any folder.

    Args:
        run: Settings of the run.
        recorded: Settings in its run.yaml, whose paths count even where nothing exists any more.
    """
    tree, old = config.to_dict(run), config.flatten(recorded) if recorded else {}
    for name in PATH_SETTINGS:
        section, key = name.split(".")
        value = tree[section][key]
        if not value or "://" in value or value in ("self", "words") or is_named_source(value):
            continue
        path, at, suffix = value.partition("@") if name == "init.source" else (value, "", "")
        absolute = os.path.abspath(path)
        if Path(path).exists() or ("{" in path and os.path.isdir(os.path.dirname(absolute))):
            tree[section][key] = absolute + at + suffix
        elif absolute + at + suffix == old.get(name):
            tree[section][key] = old[name]
    return config.validate(tree)


RESUMABLE_SETTINGS = (
    "environment", "init.path", "train.device", "train.num_threads", "train.sharding", "train.micro_batch_size",
    "train.activation_checkpointing", "train.compile", "train.rank_timeout_s", "train.keep_checkpoints",
    "train.milestone_every", "train.deterministic", "train.tf32", "monitor.", "ema.device",
)  # fmt: skip
"""Settings that may change when a run is resumed, as they change its result only by rounding errors."""


def prepare_run_folder(out: Path, run: RunConfig, device: torch.device, ranks: Ranks = SINGLE_PROCESS) -> RunConfig:
    """Return the run to train: `run`, recorded in run.yaml of a new folder, or the recorded one of a resumed run.

    Raises:
        UsageError: The folder contains another run, or other files.
    """
    record = out / "run.yaml"
    if not record.exists():
        unexpected_files = [p.name for p in out.iterdir() if not p.name.startswith(".")]
        if unexpected_files:
            raise UsageError(
                f"{out} contains other files ({', '.join(unexpected_files[:3])}) and no run; choose another --out"
            )
        run = run.model_copy(update={"environment": environment(device, ranks)})
        config.save_config(run, record)
        for path in extensions.source_files():  # a copy for readers; gesso never executes it by itself
            atomic_io.write_text(out / "code" / path.name, path.read_text(encoding="utf-8"))
        return run
    recorded = config.load_config(record)
    replaced = _replaceable_settings(recorded, run, out)
    differing = [
        d for d in config.differences(recorded, run) if not d[0].startswith(RESUMABLE_SETTINGS) and d[0] not in replaced
    ]
    if differing:
        lines = "\n".join(f"  {path}: recorded {old!r}, now {new!r}" for path, old, new in differing[:8])
        raise UsageError(
            f"{out} contains another run, which cannot be resumed with these settings:\n{lines}\nChoose another --out."
        )
    if replaced and ranks.is_main:
        tree = config.to_dict(recorded)
        for name in replaced:
            section, key = name.split(".")
            tree[section][key] = config.to_dict(run)[section][key]
        config.save_config(config.validate(tree), record)
    return run.model_copy(update={"environment": recorded.environment})


def _normalized(names: Sequence[str] | None) -> list[str]:
    """Return names in one Unicode normalization: file systems of macOS and Linux differ in it."""
    return [unicodedata.normalize("NFC", name) for name in names or ()]


def _replaceable_settings(recorded: RunConfig, run: RunConfig, out: Path) -> list[str]:
    """Return the settings that change although they are recorded: the place of equal images, and a longer training.

    Raises:
        UsageError: The training becomes longer, but its learning rate has ended; or it becomes shorter.
    """
    names = []
    if run.data.source != recorded.data.source and run.data.fingerprint == recorded.data.fingerprint:
        names.append("data.source")
    old_names, new_names = recorded.data.class_names, run.data.class_names
    if old_names != new_names and _normalized(old_names) == _normalized(new_names):
        names.append("data.class_names")
    old, new = recorded.train.total_images, run.train.total_images
    if new == old:
        return names
    if new < old:
        raise UsageError(
            f"{out} is trained to train.total_images={old}, and {new} is less: give {old} or more, or choose another "
            "--out"
        )
    if recorded.optim.schedule == "cosine":
        raise UsageError(
            f"{out} cannot be trained longer: optim.schedule=cosine decays to 0 at train.total_images={old}. Start a "
            f"new run from its weights, with init={shlex.quote(str(out))} and another --out, or give {old}"
        )
    return [*names, "train.total_images"]


def start_training(
    run: RunConfig,
    out: Path,
    resume: bool,
    console: Console,
    log: Callable[[str], None],
    more_trackers: Sequence[trackers.Tracker] = (),
    callback: Callable[[int, int], None] | None = None,
) -> RunConfig:
    """Open the data set and the run folder, and train. Every rank calls it, and only the first prints.

    Args:
        run: Settings of the run.
        out: Run folder.
        resume: True to resume a run that `out` contains.
        console: Console of notes and of the progress bar.
        log: Function that prints a line.
        more_trackers: Trackers besides those of the settings.
        callback: Called on the first rank after each step with the number of images seen and train.total_images.

    Returns:
        The settings that are recorded in run.yaml.

    Raises:
        UsageError: `out` contains another run, or one and `resume` is False; or settings, images and machine do not
            fit.
        RunError: As `loop.train`.
    """
    configure_backends(run)
    with init_distributed(run) as (ranks, device):
        devices.check_precision(device, "train.precision", run.train.precision)
        if not ranks.is_main:
            console, log, callback = Console(quiet=True), lambda text: None, None
        run_exists = (out / "run.yaml").exists()
        ranks.barrier()  # all ranks check before the first one writes run.yaml
        if run_exists and not resume:
            raise UsageError(f"{out} already contains a run: add --resume to resume it, or choose another --out")
        recorded = config.load_config(out / "run.yaml") if run_exists else None
        run = with_absolute_paths(run, recorded)
        if recorded:
            run = transfer_config.restore_recorded_settings(run, recorded)
        # The source is opened before any image is read, and not needed any more if there is a checkpoint.
        needs_source = run.init.source is not None and not checkpoint.list_checkpoints(out / "state")
        source = init_source.open_init_source(run) if needs_source else None
        run, dataset = open_dataset_for_run(run, console)
        if run.monitor.validate_every:
            validation.open_validation_set(run, dataset)  # raises before the run folder is created
        optimizer.check_optimizer_config(run)
        with atomic_io.lock_dir(out) if ranks.is_main else contextlib.nullcontext():
            if ranks.is_main:
                atomic_io.check_run_folder(out, "state", "snapshots", "samples", "sheets", "evaluation")
                for folder in (out, out / "state", out / "snapshots"):
                    atomic_io.remove_leftovers(folder)
            denoiser, report = None, list[str]()
            if source:
                run, denoiser, report = transfer.init_from_source(run, source)
                source = None  # frees its weights
            check_sampling(run)  # again, because the source may have set the process
            if ranks.is_main:
                prepare_run_folder(out, run, device, ranks)
            ranks.barrier()
            run = prepare_run_folder(out, run, device, ranks)
            for line in [*(_environment_notes(run, device, ranks) if run_exists else ()), *report]:
                log(line)
            if report and ranks.is_main:
                atomic_io.write_text(out / "transfer.txt", "\n".join(report) + "\n")
            num_ranks = f", {ranks.world_size} ranks ({run.train.sharding})" if ranks.world_size > 1 else ""
            log(f"training in {out}: {len(dataset):,} images, {run.net.name}, {run.process.name}{num_ranks}")
            loop.train(run, dataset, out, console, ranks, device, denoiser, more_trackers, callback)
    return run


def _environment_notes(run: RunConfig, device: torch.device, ranks: Ranks) -> list[str]:
    """Return notes on changes of the environment that a resumed run was started in, except to gesso."""
    now = environment(device, ranks)
    changes = [
        f"{name} {run.environment.get(name)} -> {value}"
        for name, value in now.items()
        if name not in ("gesso", "commit", "code") and run.environment.get(name) != value
    ]
    notes = [f"note: {'; '.join(changes)}: the result will agree closely, but not bit for bit"] if changes else []
    old_code, code = (record.get("code", "none") for record in (run.environment, now))
    if code != old_code:
        notes.append(f"note: the run was started with other code ({old_code}) than now ({code})")
    return notes


def configure_backends(run: RunConfig) -> None:
    """Set torch's global options that the run selects: threads, TF32 and deterministic algorithms."""
    if run.train.num_threads:
        torch.set_num_threads(run.train.num_threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = run.train.tf32
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False  # as in EDM2's published training loop
    if run.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
