"""gesso's command line: parses, calls, prints."""

import signal
import sys
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gesso import torchrun
from gesso.errors import GessoError

# What Pillow finds odd in a picture's metadata concerns nobody; what it cannot decode is counted and named.
warnings.filterwarnings("ignore", module="PIL")
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Latent diffusion image models from scratch, on even ground. Settings are written a.b=c, such as train.total_images=200k.",
)
# Of several ranks the first one speaks; each may complain.
console = Console(highlight=False, emoji=False, quiet=torchrun.place().rank > 0)
errors = Console(stderr=True, highlight=False, emoji=False)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[a.b=c ...]", help="settings, or YAML files of settings", show_default=False),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="a run folder, such as runs/digits", show_default=False)]
Out = Annotated[Path | None, typer.Option("--out", help="where to write", show_default=False)]


def _say(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def _say_all(lines: Iterable[str]) -> None:
    for line in lines:
        _say(line)


@app.command()
def train(
    recipe: Annotated[
        str,
        typer.Argument(help="a recipe (gesso recipes), folder:PATH, a run.yaml, or a run folder", show_default=False),
    ],
    settings: Overrides = None,
    out: Out = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the newest state; start when there is none")
    ] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="memory, time and disk from some real steps; writes nothing")
    ] = False,
) -> None:
    """Train a recipe. Writes to runs/RECIPE unless --out says otherwise."""
    from gesso import recipes

    run, notes = recipes.resolve(recipe, list(settings or ()))
    _say_all(f"note: {note}" for note in notes)
    if estimate:
        from gesso.train.estimate import estimate as measured

        return _say_all(measured(run, console))
    from gesso.train.start import default_out, start

    out = out or default_out(recipe, run, resume)
    run = start(run, out, resume, console, _say)
    _say(
        f"trained: {out}\nnext:\n  gesso sample {out}"
        + (" --label 0" if run.inputs.num_classes else "")
        + f"\n  gesso evaluate {out}\n  gesso report {out}"
    )


@app.command()
def sample(
    folder: RunFolder,
    settings: Overrides = None,
    label: Annotated[
        str | None,
        typer.Option(help="class numbers or names: 7, 0-9, 3,5, cat; all in turn by default", show_default=False),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="words, where the run was trained with them; may be repeated", show_default=False),
    ] = None,
    size: Annotated[str | None, typer.Option(help="original size to imitate: 512x512", show_default=False)] = None,
    flip: Annotated[str | None, typer.Option(help="mirrored: yes or no (default no)", show_default=False)] = None,
    crop: Annotated[
        str | None, typer.Option(help="top,left,bottom,right, or full (default training's box)", show_default=False)
    ] = None,
    control: Annotated[
        list[str] | None, typer.Option(help="any control variable: aspect=4:3, brightness=128", show_default=False)
    ] = None,
    seeds: Annotated[str, typer.Option(help="0-15, or 1,5,9: an image depends on its seed alone")] = "0-15",
    nimg: Annotated[
        str | None, typer.Option(help="time in training, such as 100k; the last by default", show_default=False)
    ] = None,
    out: Out = None,
) -> None:
    """Draw images from a trained run (sample.* may be set: sample.guidance=2 sample.sigma_rel=0.05)."""
    from gesso import config
    from gesso.generate import Asked, draw

    run = config.recorded(folder, settings, ("sample.",))
    said = dict(part.partition("=")[::2] for part in control or ())
    said |= {name: text for name, text in (("size", size), ("flip", flip), ("crop", crop)) if text is not None}
    _say_all(draw(folder, run, Asked(label, tuple(prompt or ()), said, seeds, nimg), out))


@app.command()
def evaluate(
    folder: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="a run folder", show_default=False)] = None,
    settings: Overrides = None,
    protocol: Annotated[str | None, typer.Option(help="a paper's way: edm2, berrada, ...", show_default=False)] = None,
    images: Annotated[str | None, typer.Option(help="no run: a source or .npz of pictures", show_default=False)] = None,
    ref: Annotated[str | None, typer.Option(help="pictures to compare with", show_default=False)] = None,
    metrics: Annotated[str | None, typer.Option(help="fid,kid,is,pr,fd_dinov2, ...", show_default=False)] = None,
    resolution: Annotated[int | None, typer.Option(min=1, help="crop and resize both", show_default=False)] = None,
    resize: Annotated[
        str | None, typer.Option(help="by which filter: lanczos, adm, bicubic", show_default=False)
    ] = None,
    count: Annotated[int | None, typer.Option(min=2, help="the first so many pictures", show_default=False)] = None,
    weights: Annotated[Path | None, typer.Option(help="folder of weight files", show_default=False)] = None,
    kid_subset: Annotated[int | None, typer.Option(min=2, help="of kid (default 1000)", show_default=False)] = None,
    inception: Annotated[
        str | None, typer.Option(help="torch-fidelity (default), pytorch-fid or nvidia", show_default=False)
    ] = None,
    dinov2: Annotated[str | None, typer.Option(help="folder or hub id", show_default=False)] = None,
    clip: Annotated[str | None, typer.Option(help="folder or hub id", show_default=False)] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda", show_default=False)] = None,
    out: Out = None,
) -> None:
    """Measure a run (sample.* and eval.* may be set), or pictures beside others; writes metrics.json and pictures."""
    told = {f"--{name}": value for name, value in locals().items() if name not in ("folder", "settings", "protocol")}
    from gesso.evaluate.protocols import evaluate
    from gesso.train.log import Bar

    with Bar(console, 1, 0, "evaluating") as bar:
        lines = evaluate(folder, protocol, settings or [], told, lambda done, total: bar.update(done, total=total))
    _say_all(lines)


@app.command()
def ema(
    folder: RunFolder,
    settings: Overrides = None,
    sigma_rel: Annotated[
        list[float] | None, typer.Option(help="relative EMA length, between 0 and 0.2886; may be repeated")
    ] = None,
    halflife: Annotated[
        list[str] | None, typer.Option(help="traditional EMA in images, such as 50M; may be repeated")
    ] = None,
    nimg: Annotated[str | None, typer.Option(help="time, such as 100k (default: the last)", show_default=False)] = None,
    tensors: Annotated[list[str] | None, typer.Option(help="GLOB=LENGTH; with --sweep GLOB")] = None,
    sweep: Annotated[str | None, typer.Option(help="measure LOW:HIGH:COUNT lengths", show_default=False)] = None,
    metric: Annotated[str | None, typer.Option(help="of --sweep, such as fd", show_default=False)] = None,
    guidance: Annotated[str | None, typer.Option(help="of --sweep: 1,1.5,2", show_default=False)] = None,
    repeats: Annotated[int, typer.Option(min=1, help="of --sweep, with other seeds")] = 1,
    files: Annotated[list[str] | None, typer.Option(help="another trainer's: step-{step}.safetensors")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="images of a step", show_default=False)] = None,
    decay: Annotated[float | None, typer.Option(help="of --files that are EMAs, each step", show_default=False)] = None,
    out: Out = None,
) -> None:
    """Weights averaged over any length, made after training from what was stored; or quality at each length."""
    from gesso import config
    from gesso.evaluate import averages
    from gesso.evaluate import sweep as sweeps
    from gesso.train.log import Bar

    if not sweep:
        asked = averages.Asked(sigma_rel or (), halflife or (), tensors or (), nimg, files or (), batch_size, decay)
        lines = averages.average(folder, asked, out, {"--metric": metric, "--guidance": guidance, "a.b=c": settings})
    else:
        averages.check_measurable(folder, {"--files": files, "--decay": decay, "--halflife": halflife, "--out": out})
        run = config.recorded(folder, settings, ("sample.", "eval."))
        wanted = sweeps.Asked(sweep, metric, guidance, tensors or (), sigma_rel or (), nimg, repeats)
        with Bar(console, 1, 0, "measuring") as bar:
            lines = sweeps.sweep(folder, run, wanted, lambda done, total: bar.update(done, total=total))
    _say_all(lines)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders", show_default=False)],
    out: Out = None,
) -> None:
    """One self-contained HTML page on a run, or on several beside each other, from the files in their folders."""
    from gesso.report import write

    _say(f"wrote {write(folders, out)}")


@app.command()
def table(
    name: Annotated[str, typer.Argument(help="berrada/2a, edm2/1, ...; list shows all", show_default=False)],
    settings: Overrides = None,
    scale: Annotated[str, typer.Option(help="tiny (two cores), small (one GPU) or paper")] = "tiny",
    rows: Annotated[list[str] | None, typer.Option("--rows", help="one of them; may be repeated")] = None,
    seeds: Annotated[int, typer.Option(help="trainings of every row")] = 1,
    where: Annotated[Path, typer.Option("--out", help="trainings, numbers and pages")] = Path("tables"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="what it takes, checked; nothing is run")] = False,
    slurm: Annotated[Path | None, typer.Option(help="write job arrays into this folder", show_default=False)] = None,
) -> None:
    """A table or figure of the papers: trained, measured, beside the published numbers. Goes on where it stopped."""
    from gesso.tables.command import Asked, command

    asked = Asked(name, tuple(settings or ()), scale, tuple(rows or ()), seeds, where, dry_run, slurm)
    command(asked, console, _say)


@app.command()
def data(
    where: Annotated[str, typer.Argument(metavar="SOURCE", help="as data.source, or a cache", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="the sheet of pictures to write")] = Path("sheet.png"),
    rows: Annotated[int, typer.Option(min=1, max=100, help="images on the sheet")] = 8,
    views: Annotated[int, typer.Option(min=1, max=12, help="of each image")] = 4,
    crop_scale: Annotated[str | None, typer.Option(help="shares of the area: .4,.6", show_default=False)] = None,
    flip: Annotated[bool, typer.Option("--flip", help="mirror half of the views")] = False,
    resolution: Annotated[int | None, typer.Option(min=1, help="of the views", show_default=False)] = None,
    limit: Annotated[int, typer.Option(min=1, help="headers and captions to read")] = 5_000,
    seed: Annotated[int, typer.Option(min=0, help="of the views, as in a cache")] = 0,
    resize: Annotated[str, typer.Option(help="filter: lanczos, adm, bicubic")] = "lanczos",
    vae: Annotated[str | None, typer.Option(help="to show latents with", show_default=False)] = None,
    convention: Annotated[str, typer.Option(help="of those latents: dit or edm2")] = "dit",
) -> None:
    """What a source of images or a cache holds: counts, sizes, classes, captions, and a sheet of views to look at."""
    from gesso.data.examine import Asked, examine, shares

    scale = None if crop_scale is None else shares(crop_scale)
    asked = Asked(rows, views, scale, flip, resolution, seed, vae, convention, resize)
    _say_all(examine(where, limit, asked, out, console))


@app.command()
def cache(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="as data.source; OUT with --check", show_default=False)
    ],
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="folder to write", show_default=False)] = None,
    settings: Overrides = None,
    resolution: Annotated[int | None, typer.Option(help="height and width in pixels", show_default=False)] = None,
    channels: Annotated[int | None, typer.Option(help="1 grey, 3 RGB (default)", show_default=False)] = None,
    crop_scale: Annotated[str | None, typer.Option(help="shares of the area: .4,.6", show_default=False)] = None,
    flip: Annotated[bool, typer.Option("--flip", help="mirror every other view")] = False,
    resize: Annotated[str | None, typer.Option(help="lanczos (default), adm or bicubic", show_default=False)] = None,
    views: Annotated[int | None, typer.Option(help="of each image (default 1)", show_default=False)] = None,
    vae: Annotated[str | None, typer.Option(help="store latents: folder or hub id", show_default=False)] = None,
    convention: Annotated[str | None, typer.Option(help="dit (default) or edm2", show_default=False)] = None,
    text: Annotated[str | None, typer.Option(help="store tokens: words, or a CLIP or T5", show_default=False)] = None,
    tokens: Annotated[int | None, typer.Option(help="of a caption (default 16)", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(help="float16 (default) or float32", show_default=False)] = None,
    blur_faces: Annotated[bool, typer.Option("--blur-faces", help="before anything else")] = False,
    buckets: Annotated[int | None, typer.Option(help="how many aspects, odd", show_default=False)] = None,
    shard_images: Annotated[int | None, typer.Option(help="images of a file", show_default=False)] = None,
    batch_size: Annotated[int | None, typer.Option(help="views (default 32)", show_default=False)] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
    check: Annotated[bool, typer.Option("--check", help="whether OUT is as it was written")] = False,
) -> None:
    """Crops, latents and text tokens of SOURCE, to train from OUT. The same command goes on after any stop."""
    told = {f"--{name.replace('_', '-')}": value for name, value in locals().items()}
    from gesso.config.cache import planned
    from gesso.data import caching, shards
    from gesso.train.log import Bar
    from gesso.train.loop import caught_signals

    plan = planned(source, out, told, settings or [])
    with caught_signals() as caught, Bar(console, 1, 0, "checking" if check else "caching") as bar:
        if plan is None:
            lines = shards.check(source, lambda done, total: bar.update(done, total=total))
        else:
            lines = caching.write(plan, out, device, lambda done, total: bar.update(done, total=total), _say, caught)
    _say_all(lines or ([f"{source} is as it was written"] if plan is None else []))
    raise typer.Exit(int(plan is None and bool(lines)))


@app.command()
def models(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME ...]", help="some of them; all by default")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Parameters and FLOPs of every network beside the published figures."""
    from gesso.nets.count import render, table

    _say(render(table(names), as_json))


@app.command()
def recipes() -> None:
    """The recipes, one line each."""
    from gesso.recipes import listed

    _say_all(listed())


@app.command()
def show(recipe: str, settings: Overrides = None) -> None:
    """The resolved settings of a recipe, run.yaml or run folder, as YAML, with what each is and its equation."""
    from gesso import config
    from gesso import recipes as known

    run, notes = known.resolve(recipe, list(settings or ()))
    errors.print(*(f"note: {note}\n" for note in notes), sep="", end="", markup=False)
    sys.stdout.write(config.explained(run))


@app.command()
def diff(a: str, b: str) -> None:
    """Where two runs or recipes differ."""
    from gesso import config
    from gesso import recipes as known

    left, right = (known.resolve(name, [])[0] for name in (a, b))
    rows = config.differences(left, right)
    _say_all([f"{path}: {old!r} -> {new!r}" for path, old, new in rows] or ["no difference"])


@app.command()
def doctor() -> None:
    """What this machine has, what is wrong with it, and the cure."""
    from gesso.doctor import examine, render

    findings = examine()
    _say(render(findings))
    if any(f.level == "problem" for f in findings):
        raise typer.Exit(1)


def main() -> None:
    """Run the command line. Errors a user can cause are one to three lines; --debug adds the traceback."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app(prog_name="gesso")
    except GessoError as error:
        if debug:
            traceback.print_exc()
        errors.print(f"gesso: {error}", markup=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        errors.print("gesso: interrupted")
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
