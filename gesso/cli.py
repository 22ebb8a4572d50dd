"""Command line of gesso: parses arguments, calls the library, prints the result."""

import os
import shlex
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console

import gesso
from gesso.errors import GessoError, UsageError
from gesso.hub import fetch_run
from gesso.untrusted import print_text

# Pillow warns about unusual image metadata; images that it cannot decode are counted and reported.
warnings.filterwarnings("ignore", module="PIL")
app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Train latent diffusion image models from scratch and compare them fairly. "
    "Settings are written a.b=c, such as train.total_images=200k; gesso config RECIPE lists them.",
)
# Only the first rank prints; every rank may print errors.
console = Console(highlight=False, emoji=False, quiet=int(os.environ.get("RANK", 0)) > 0)
errors = Console(stderr=True, highlight=False, emoji=False)


def _argument(help: str, *, metavar: str | None = None) -> Any:
    """Return a command argument without a default in the help text."""
    return typer.Argument(help=help, metavar=metavar, show_default=False)


def _option(help: str, flag: str | None = None, *, min: int | None = None) -> Any:
    """Return a command option without a default in the help text."""
    return typer.Option(*([flag] if flag else []), help=help, min=min, show_default=False)


Overrides = Annotated[
    list[str] | None,
    _argument("settings, or YAML files of settings", metavar="[a.b=c ...]"),
]
RunFolder = Annotated[
    Path,
    typer.Argument(
        help="run folder, such as runs/digits, or hub:OWNER/NAME", metavar="RUN", parser=fetch_run, show_default=False
    ),
]
Out = Annotated[Path | None, _option("output file or folder", "--out")]
AllowAddresses = Annotated[
    bool, typer.Option("--allow-addresses", help="fetch from addresses (s3://, https://) that a recorded run names")
]
Recipe = Annotated[
    str,
    _argument("recipe (see gesso recipes), folder:PATH, a run.yaml, a run folder, or a Python file with recipe()"),
]


def _print(text: str) -> None:
    print_text(console, text)


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        _print(line)


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar; yield a function of (done, total) that updates it."""
    from gesso.training.logging import ProgressBar

    with ProgressBar(console, 1, 0, title) as bar:
        yield lambda done, total: bar.update(done, total=total)


def _print_version(requested: bool) -> None:
    if requested:
        _print(f"gesso {gesso.__version__}")
        raise typer.Exit()


@app.callback()
def load_code(
    code: Annotated[
        list[Path] | None,
        typer.Option("--code", help="Python file that calls gesso.extend, to execute first; may be repeated"),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", help="print the version and exit", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Execute the files of --code, which make networks, data sets, losses and control variables available."""
    if code:
        from gesso import extensions

        for file in code:
            extensions.load_code(file)


def _code_options() -> str:
    """Return the --code options that commands on a run of this process need."""
    from gesso import extensions

    return "".join(f" --code {shlex.quote(str(file))}" for file in extensions.loaded_files())


@app.command()
def train(
    recipe: Recipe,
    settings: Overrides = None,
    out: Out = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="continue from the latest checkpoint; start if there is none")
    ] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="estimate memory, time and disk from a few steps; write nothing")
    ] = False,
    allow_addresses: AllowAddresses = False,
) -> None:
    """Train a recipe. The default output folder is runs/RECIPE."""
    from gesso import recipes
    from gesso.config.addresses import confirm_addresses

    run, notes = recipes.resolve(recipe, list(settings or ()))
    confirm_addresses(run, settings or [], allow_addresses)
    _print_lines(f"note: {note}" for note in notes)
    if estimate:
        from gesso.training.estimate import estimate as estimate_run

        return _print_lines(estimate_run(run, console))
    from gesso.training.run_folder import default_run_folder, start_training

    out = out or default_run_folder(recipe, run, resume)
    try:
        run = start_training(run, out, resume, console, _print)
    except UsageError as error:
        if not recipe.startswith("folder:"):
            raise
        # The user wrote folder:PATH, not data.source=PATH.
        raise UsageError(str(error).replace(f"data.source={run.data.source}:", f"folder:{run.data.source}:")) from None
    label = " --label 0" if run.input_spec.num_classes else ""
    program, folder = f"gesso{_code_options()}", shlex.quote(str(out))
    _print(f"trained: {out}\nnext:")
    _print_lines(
        f"  {program} {command}" for command in (f"sample {folder}{label}", f"evaluate {folder}", f"report {folder}")
    )


@app.command()
def sample(
    folder: RunFolder,
    settings: Overrides = None,
    label: Annotated[str | None, _option("classes by name or number: cat, 7, 0-9, 3,5 (default: all in turn)")] = None,
    prompt: Annotated[list[str] | None, _option("prompt of a run trained on text; may be repeated")] = None,
    size: Annotated[str | None, _option("original size to condition on, such as 512x512")] = None,
    flip: Annotated[str | None, _option("condition on a mirrored image: yes or no (default no)")] = None,
    crop: Annotated[
        str | None, _option("crop to condition on: top,left,bottom,right or full (default: training's centre crop)")
    ] = None,
    control: Annotated[list[str] | None, _option("any control variable, such as aspect=4:3 or brightness=128")] = None,
    seeds: Annotated[str, typer.Option(help="seeds: 0-15, or 1,5,9; one image per seed")] = "0-15",
    nimg: Annotated[str | None, _option("images seen by the weights, such as 100k (default: the last)")] = None,
    out: Out = None,
) -> None:
    """Sample images from a trained run. Settings sample.* may be changed, such as sample.guidance=2."""
    from gesso import config
    from gesso.sample_files import SampleArgs, sample_to_folder

    run = config.load_with_overrides(folder, settings, ("sample.",))
    _print_lines(config.unused_sample_settings(config.load_config(folder / "run.yaml"), run))
    controls = dict(part.partition("=")[::2] for part in control or ())
    controls |= {name: text for name, text in (("size", size), ("flip", flip), ("crop", crop)) if text is not None}
    args = SampleArgs(label, tuple(prompt or ()), controls, seeds, nimg)
    with _progress("sampling") as progress:
        lines = sample_to_folder(folder, run, args, out, progress)
    _print_lines(lines)


@app.command()
def evaluate(
    folder: Annotated[Path | None, _argument("run folder", metavar="[RUN]")] = None,
    settings: Overrides = None,
    protocol: Annotated[str | None, _option("evaluation protocol of a paper: edm2, berrada, ...")] = None,
    images: Annotated[str | None, _option("in place of a run: a source of images or an .npz file")] = None,
    ref: Annotated[str | None, _option("reference images for --images")] = None,
    metrics: Annotated[str | None, _option("metrics: fid,kid,is,pr,fd_dinov2, ...")] = None,
    resolution: Annotated[int | None, _option("resolution to crop and resize both to", min=1)] = None,
    resize: Annotated[str | None, _option("resizing filter: lanczos, adm or bicubic")] = None,
    num_images: Annotated[int | None, _option("number of images to use, from the first", min=2)] = None,
    weights_dir: Annotated[Path | None, _option("folder with the weights of feature networks")] = None,
    kid_subset: Annotated[int | None, _option("images per subset of kid (default 1000)", min=2)] = None,
    inception: Annotated[str | None, _option("torch-fidelity (default), pytorch-fid or nvidia")] = None,
    dinov2: Annotated[str | None, _option("folder or hub id of DINOv2")] = None,
    clip: Annotated[str | None, _option("folder or hub id of CLIP")] = None,
    device: Annotated[str | None, _option("auto, cpu or cuda")] = None,
    out: Out = None,
    allow_addresses: AllowAddresses = False,
) -> None:
    """Evaluate a run (settings sample.* and eval.* may be changed), or a set of images against a reference."""
    not_flags = ("folder", "settings", "protocol", "allow_addresses")
    flags = {k: v for k, v in locals().items() if k not in (*not_flags, "not_flags") and v is not None}
    from gesso.config.addresses import confirm_addresses
    from gesso.evaluation import protocols, runner

    if folder is not None and flags:
        flag = next(iter(flags)).replace("_", "-")
        raise UsageError(f"--{flag} is for --images; for a run use settings, such as sample.steps=50")
    with _progress("evaluating") as progress:
        if folder is None:
            lines = runner.evaluate_images(runner.parse_image_args(settings or [], flags), progress)[1]
        else:
            run = protocols.apply_protocol(folder, protocol, settings or [])
            confirm_addresses(run, settings or [], allow_addresses)
            lines = runner.evaluate_run(folder, run, progress, _print)
            lines.append(f"next:\n  gesso report {shlex.quote(str(folder))}")
    _print_lines(lines)


@app.command()
def ema(
    folder: RunFolder,
    settings: Overrides = None,
    sigma_rel: Annotated[
        list[float] | None, typer.Option(help="relative EMA length, between 0 and 0.2886; may be repeated")
    ] = None,
    halflife: Annotated[
        list[str] | None, typer.Option(help="half-life of a traditional EMA in images, such as 50M; may be repeated")
    ] = None,
    nimg: Annotated[str | None, _option("images seen, such as 100k (default: the last)")] = None,
    tensors: Annotated[
        list[str] | None, typer.Option(help="EMA length of some tensors: GLOB=LENGTH; with --sweep: GLOB")
    ] = None,
    sweep: Annotated[str | None, _option("evaluate EMA lengths LOW:HIGH:COUNT")] = None,
    metric: Annotated[str | None, _option("metric of --sweep, such as frechet_distance or class_accuracy")] = None,
    guidance: Annotated[str | None, _option("guidance scales of --sweep, such as 1,1.5,2")] = None,
    num_repeats: Annotated[int, typer.Option(min=1, help="evaluations per point of --sweep, with other seeds")] = 1,
    files: Annotated[
        list[str] | None, typer.Option(help="snapshots of another trainer, such as step-{step}.safetensors")
    ] = None,
    batch_size: Annotated[int | None, _option("images per step of --files", min=1)] = None,
    decay: Annotated[float | None, _option("EMA decay per step, if --files are traditional EMAs")] = None,
    out: Out = None,
    allow_addresses: AllowAddresses = False,
) -> None:
    """Reconstruct EMA weights of any length from the snapshots of a run, or evaluate quality against EMA length."""
    from gesso import config
    from gesso.config.addresses import confirm_addresses
    from gesso.evaluation import ema_export as export
    from gesso.evaluation import ema_sweep

    if not sweep:
        args = export.EmaArgs(sigma_rel or (), halflife or (), tensors or (), nimg, files or (), batch_size, decay)
        unused = {"--metric": metric, "--guidance": guidance, "a.b=c": settings}
        return _print_lines(export.export_ema(folder, args, out, unused))
    export.check_sweepable(folder, {"--files": files, "--decay": decay, "--halflife": halflife, "--out": out})
    run = config.load_with_overrides(folder, settings, ("sample.", "eval.", "data.source"))
    confirm_addresses(run, settings or [], allow_addresses)
    sweep_args = ema_sweep.EmaSweepArgs(sweep, metric, guidance, tensors or (), sigma_rel or (), nimg, num_repeats)
    with _progress("evaluating") as progress:
        lines = ema_sweep.run_ema_sweep(folder, run, sweep_args, progress)
    _print_lines(lines)


@app.command()
def export(
    folder: RunFolder,
    out: Annotated[Path, _argument("folder or file to write", metavar="OUT")],
    settings: Overrides = None,
    format_name: Annotated[
        str,
        typer.Option(
            "--format",
            help="diffusers (pipeline folder), diffusers-native (diffusers' own pipeline), edm2 (state dict) or "
            "torch-export (program)",
        ),
    ] = "diffusers",
    sigma_rel: Annotated[float | None, _option("relative EMA length (default: sample.sigma_rel)")] = None,
    nimg: Annotated[str | None, _option("images seen by the weights, such as 100k (default: the last)")] = None,
) -> None:
    """Export a run for other tools. Settings sample.* may be changed; they are the defaults of the pipeline."""
    from gesso import config
    from gesso.export import export_run
    from gesso.sample_files import parse_nimg

    changes = [*(settings or []), *([f"sample.sigma_rel={sigma_rel}"] if sigma_rel is not None else [])]
    run = config.load_with_overrides(folder, changes, ("sample.",))
    _print_lines(export_run(folder, run, out, format_name, parse_nimg(nimg)))


@app.command("import")
def import_weights(
    file: Annotated[Path, _argument("weights: .safetensors, .pt, or .pkl of EDM2", metavar="FILE")],
    out: Annotated[Path | None, _option("write the weights as safetensors, for init.source", "--out")] = None,
    num_heads: Annotated[int | None, _option("attention heads, if the weights do not determine them", min=1)] = None,
) -> None:
    """Print what a file of weights of another project holds. Files are read without running code in them."""
    from gesso.interop.files import import_file

    _print_lines(import_file(file, out, num_heads))


@app.command()
def report(
    folders: Annotated[list[Path], _argument("run folders", metavar="RUN...")],
    out: Out = None,
) -> None:
    """Write a self-contained HTML page on a run, or a comparison of several runs."""
    from gesso.report import write_report

    _print(f"wrote {write_report(folders, out)}")


@app.command()
def push(
    folder: RunFolder,
    repo: Annotated[str, _argument("repository on the Hugging Face Hub", metavar="OWNER/NAME")],
    private: Annotated[bool, typer.Option("--private", help="create a private repository")] = False,
    license: Annotated[str | None, _option("licence of the weights, such as cc-by-nc-4.0")] = None,
    all_snapshots: Annotated[
        bool, typer.Option("--all-snapshots", help="upload all snapshots, for EMA weights of any length and time")
    ] = False,
    samples: Annotated[bool, typer.Option(help="draw images for the model card")] = True,
) -> None:
    """Upload a run and its model card to the Hugging Face Hub, without local paths."""
    from gesso.share import PushArgs
    from gesso.share import push as push_run

    _print(f"uploaded: {push_run(folder, PushArgs(repo, private, license, all_snapshots, samples), _print)}")


@app.command()
def play(
    folders: Annotated[
        list[Path],
        typer.Argument(help="run folders, or hub:OWNER/NAME", metavar="RUN...", parser=fetch_run, show_default=False),
    ],
    host: Annotated[
        str, typer.Option(help="address to bind to; everybody who reaches it can sample the runs")
    ] = "127.0.0.1",
    port: Annotated[int | None, _option("port (default: the first free one from 7860)", min=1)] = None,
) -> None:
    """Serve a local page that samples runs while their settings change. Ctrl-C ends it."""
    from gesso.api import Run
    from gesso.play import page

    playground = page.Playground([Run(folder) for folder in folders], f"gesso{_code_options()}")
    served, url = page.serve(playground, host, port)
    _print(f"playground: {url}\nCtrl-C ends it.")
    with suppress(KeyboardInterrupt):
        threading.Event().wait()
    served.close()


@app.command("reproduce")
def reproduce_table(
    name: Annotated[str, _argument("table or figure: berrada/2a, edm2/1, ...; list shows all")],
    settings: Overrides = None,
    scale: Annotated[str, typer.Option(help="tiny (two CPU cores), small (one GPU) or paper")] = "tiny",
    rows: Annotated[
        list[str] | None, typer.Option("--rows", help="row to reproduce; may be repeated (default: all)")
    ] = None,
    num_seeds: Annotated[int, typer.Option(help="number of trainings per row")] = 1,
    out: Annotated[Path, typer.Option("--out", help="folder of trainings, measurements and pages")] = Path("tables"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check everything and print the cost; run nothing")
    ] = False,
    slurm: Annotated[Path | None, _option("folder to write Slurm job arrays to")] = None,
) -> None:
    """Reproduce a table or figure of the papers and compare it with the published numbers. Continues if stopped."""
    from gesso.papers import TABLES
    from gesso.reproduce.cli import ReproduceArgs, reproduce

    args = ReproduceArgs(name, tuple(settings or ()), scale, tuple(rows or ()), num_seeds, out, dry_run, slurm)
    reproduce(args, TABLES, console, _print)


@app.command("sweep")
def sweep_settings(
    recipe: Annotated[str, _argument("recipe, as for gesso train")],
    settings: Overrides = None,
    over: Annotated[
        list[str] | None,
        typer.Option("--over", help="setting with its values, such as optim.lr=1e-3,2e-3; may be repeated"),
    ] = None,
    metric: Annotated[str, typer.Option(help="metric to compare: loss, fd_digits, fid, ...")] = "loss",
    num_seeds: Annotated[int, typer.Option(help="number of trainings per point")] = 1,
    out: Annotated[Path, typer.Option("--out", help="folder of trainings, measurements and the page")] = Path("sweeps"),
    name: Annotated[str | None, _option("name of the page (default: the recipe)")] = None,
) -> None:
    """Train a recipe at every point of a grid of settings and compare one metric. Continues if stopped."""
    from gesso.reproduce.sweep import SweepArgs, sweep

    args = SweepArgs(recipe, tuple(over or ()), tuple(settings or ()), metric, num_seeds, out, name)
    sweep(args, console, _print)


@app.command("inspect")
def inspect_data(
    source: Annotated[str, _argument("source as in data.source, or a cache", metavar="SOURCE")],
    out: Annotated[Path, typer.Option("--out", help="image file of the contact sheet")] = Path("sheet.png"),
    rows: Annotated[int, typer.Option(min=1, max=100, help="number of images on the contact sheet")] = 8,
    views: Annotated[int, typer.Option(min=1, max=12, help="number of views per image")] = 4,
    crop_scale: Annotated[str | None, _option("range of the area of random crops: .4,.6")] = None,
    flip: Annotated[bool, typer.Option("--flip", help="mirror half of the views")] = False,
    resolution: Annotated[int | None, _option("resolution of the views in pixels", min=1)] = None,
    limit: Annotated[int, typer.Option(min=1, help="number of image headers and captions to read")] = 5_000,
    seed: Annotated[int, typer.Option(min=0, help="seed of the views, as in a cache")] = 0,
    resize: Annotated[str, typer.Option(help="resizing filter: lanczos, adm or bicubic")] = "lanczos",
    vae: Annotated[str | None, _option("folder or hub id of the VAE that decodes latents")] = None,
    convention: Annotated[str, typer.Option(help="convention of those latents: dit or edm2")] = "dit",
) -> None:
    """Print counts, sizes, classes and captions of an image source or cache, and draw a contact sheet of its views."""
    from gesso.config import Resize
    from gesso.config.base import source_path
    from gesso.data.inspect import InspectArgs, inspect_source, parse_crop_scale

    scale = None if crop_scale is None else parse_crop_scale(crop_scale)
    if resize not in get_args(Resize):
        raise UsageError(f"--resize {resize}: no such filter; use {', '.join(get_args(Resize))}")
    # mypy does not narrow the text to the literals of Resize.
    args = InspectArgs(rows, views, scale, flip, resolution, seed, vae, convention, resize)  # type: ignore[arg-type]
    _print_lines(inspect_source(source_path(source), limit, args, out, console))


@app.command()
def cache(
    source: Annotated[str, _argument("source as in data.source; with --check: the cache", metavar="SOURCE")],
    out: Annotated[Path | None, _argument("folder to write", metavar="OUT")] = None,
    settings: Overrides = None,
    resolution: Annotated[int | None, _option("height and width in pixels")] = None,
    channels: Annotated[int | None, _option("channels: 1 grey, 3 RGB (default)")] = None,
    crop_scale: Annotated[str | None, _option("range of the area of random crops: .4,.6")] = None,
    flip: Annotated[bool, typer.Option("--flip", help="mirror every other view")] = False,
    resize: Annotated[str | None, _option("resizing filter: lanczos (default), adm or bicubic")] = None,
    views: Annotated[int | None, _option("number of views per image (default 1)")] = None,
    vae: Annotated[str | None, _option("store latents of this VAE: folder or hub id")] = None,
    convention: Annotated[str | None, _option("convention of latents: dit (default) or edm2")] = None,
    text: Annotated[str | None, _option("store text tokens of words, or of a CLIP or T5 encoder")] = None,
    max_tokens: Annotated[int | None, _option("number of tokens per caption (default 16)")] = None,
    dtype: Annotated[str | None, _option("dtype of latents and tokens: float16 (default) or float32")] = None,
    blur_faces: Annotated[bool, typer.Option("--blur-faces", help="blur faces before cropping")] = False,
    buckets: Annotated[int | None, _option("number of aspect-ratio buckets, an odd number")] = None,
    images_per_shard: Annotated[int | None, _option("number of images per file")] = None,
    batch_size: Annotated[int | None, _option("number of views that are encoded at once (default 32)")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    check: Annotated[bool, typer.Option("--check", help="verify the files of a cache against their hashes")] = False,
) -> None:
    """Write crops, latents and text tokens of SOURCE to OUT, for training. Continues if stopped."""
    args = {f"--{name.replace('_', '-')}": value for name, value in locals().items()}
    from gesso.config.base import source_path
    from gesso.data.cache import format, write
    from gesso.data.cache.plan import parse_cache_args
    from gesso.training.loop import capture_signals

    source = source_path(source)
    plan = parse_cache_args(source, out, args, settings or [])
    with capture_signals() as received, _progress("checking" if check else "caching") as progress:
        if plan is None:
            lines = format.verify_cache(source, progress)
        else:
            assert out is not None  # parse_cache_args requires it
            lines = write.write_cache(plan, out, device, progress, _print, received)
    _print_lines(lines or ([f"{source} is as it was written"] if plan is None else []))
    raise typer.Exit(int(plan is None and bool(lines)))


@app.command()
def models(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME ...]", help="names of networks (default: all)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Print parameters and FLOPs of every network and the published numbers."""
    from gesso.models.flops import render_table, size_table

    _print(render_table(size_table(names), as_json))


@app.command()
def recipes() -> None:
    """List the recipes."""
    from gesso.recipes import list_recipes

    _print_lines(list_recipes())


@app.command("config")
def show_config(recipe: Recipe, settings: Overrides = None) -> None:
    """Print the settings of a recipe or run as YAML, with a description of each."""
    from gesso import config
    from gesso.recipes import resolve

    run, notes = resolve(recipe, list(settings or ()))
    for note in notes:
        print_text(errors, f"note: {note}")
    sys.stdout.write(config.to_annotated_yaml(run))


@app.command()
def diff(a: Recipe, b: Recipe) -> None:
    """Print the settings in which two runs or recipes differ."""
    from gesso import config
    from gesso.recipes import resolve

    left, right = (resolve(name, [])[0] for name in (a, b))
    rows = config.differences(left, right)
    _print_lines([f"{path}: {old!r} -> {new!r}" for path, old, new in rows] or ["no difference"])


@app.command()
def doctor() -> None:
    """Check this machine's installation, print problems and how to fix them."""
    from gesso.doctor import render, run_checks

    findings = run_checks()
    _print(render(findings))
    if any(f.level == "problem" for f in findings):
        raise typer.Exit(1)


def _options_first(arguments: list[str]) -> list[str]:
    """Return the arguments with --code FILE before the command, where typer expects it."""
    first, rest = list[str](), list[str]()
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--code":
            first += [argument, *([value] if (value := next(remaining, None)) is not None else [])]
        else:
            (first if argument.startswith("--code=") else rest).append(argument)
    return first + rest


def main() -> None:
    """Run the command line. GessoError prints one to three lines; --debug adds the traceback."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app(_options_first(sys.argv[1:]), prog_name="gesso")
    except GessoError as error:
        if debug:
            traceback.print_exc()
        print_text(errors, f"gesso: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print_text(errors, "gesso: interrupted")
        sys.exit(128 + signal.SIGINT)
