"""gesso's command line: parses, calls, prints."""

import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gesso.errors import GessoError, UsageError

# What Pillow finds odd in a picture's metadata concerns nobody; what it cannot decode is counted and named.
warnings.filterwarnings("ignore", module="PIL")
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Latent diffusion image models from scratch, on even ground. Settings are written a.b=c, such as train.total_images=200k.",
)
console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[a.b=c ...]", help="settings, or YAML files of settings", show_default=False),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="a run folder, such as runs/digits", show_default=False)]
Out = Annotated[Path | None, typer.Option("--out", help="where to write", show_default=False)]


def _say(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def _recorded(folder: Path, arguments: list[str] | None, changeable: tuple[str, ...]):
    """The run of a folder with settings laid over it that may change after training."""
    from gesso import config

    if not (folder / "run.yaml").is_file():
        raise UsageError(
            f"{folder} is no run folder (it has no run.yaml); train one with gesso train RECIPE --out {folder}"
        )
    recorded = config.read(folder / "run.yaml")
    run, _ = config.resolve(config.as_tree(recorded), list(arguments or ()))
    for path, _, _ in config.differences(recorded, run):
        if not path.startswith(changeable):
            allowed = ", ".join(f"{c}*" for c in changeable)
            raise UsageError(f"{path} was settled by training; what can change here is {allowed}")
    ours, own = run.sample, recorded.sample
    if ours.halflife and ours.halflife == own.halflife and ours.sigma_rel != own.sigma_rel:
        raise UsageError(
            f"sample.sigma_rel={ours.sigma_rel:g} has no effect beside this run's sample.halflife={ours.halflife}: "
            "set sample.halflife=null too"
        )
    return run


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
) -> None:
    """Train a recipe. Writes to runs/RECIPE unless --out says otherwise."""
    from gesso import recipes

    run, notes = recipes.resolve(recipe, list(settings or ()))
    for note in notes:
        _say(f"note: {note}")
    out = out or _default_out(recipe, run.recipe, run.data.source, resume)
    from gesso.train.start import start

    run = start(run, out, resume, console, _say)
    _say(
        f"trained: {out}\nnext:\n  gesso sample {out}"
        + (" --label 0" if run.inputs.num_classes else "")
        + f"\n  gesso evaluate {out}\n  gesso report {out}"
    )


def _default_out(name: str, recipe: str, source: str, resume: bool) -> Path:
    """runs/RECIPE; runs/NAME for a folder of images; beside the original for a repeated run.yaml."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_dir():
        origin = path if path.is_dir() else path.parent
        if resume or not (origin / "run.yaml").exists():
            return origin
        return next(p for i in range(2, 10_000) if not (p := origin.with_name(f"{origin.name}-{i}")).exists())
    return Path("runs") / (Path(source).resolve().name if recipe == "folder" and source else recipe)


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
        str | None, typer.Option(help="full (default), or top,left,bottom,right from 0 to 1", show_default=False)
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
    from gesso.generate import Asked, draw

    run = _recorded(folder, settings, ("sample.",))
    said = dict(part.partition("=")[::2] for part in control or ())
    said |= {name: text for name, text in (("size", size), ("flip", flip), ("crop", crop)) if text is not None}
    for line in draw(folder, run, Asked(label, tuple(prompt or ()), said, seeds, nimg), out):
        _say(line)


@app.command()
def evaluate(folder: RunFolder, settings: Overrides = None) -> None:
    """Measure a run (sample.* and eval.* may be set); writes metrics.json and pictures of samples."""
    run = _recorded(folder, settings, ("sample.", "eval."))
    from gesso.evaluate.score import evaluate_folder
    from gesso.train.log import Bar

    with Bar(console, 1, 0, "evaluating") as bar:
        lines = evaluate_folder(folder, run, lambda done, total: bar.update(done, total=total))
    for line in lines:
        _say(line)
    _say(f"wrote {folder / 'metrics.json'}\nnext:\n  gesso report {folder}")


@app.command()
def ema(
    folder: RunFolder,
    sigma_rel: Annotated[
        list[float] | None, typer.Option(help="relative EMA length, between 0 and 0.2886; may be repeated")
    ] = None,
    halflife: Annotated[
        list[str] | None, typer.Option(help="half-life of a traditional EMA in images, such as 50M; may be repeated")
    ] = None,
    nimg: Annotated[
        str | None, typer.Option(help="time in training, such as 100k; the last by default", show_default=False)
    ] = None,
    out: Out = None,
) -> None:
    """Weights averaged over any length, rebuilt after training from the stored snapshots."""
    from gesso import snapshot
    from gesso.config.base import parse_count
    from gesso.ema import Power, Traditional

    for length in sigma_rel or ():
        if not 0 < length < 12**-0.5:
            raise UsageError(f"--sigma-rel {length}: an EMA length lies between 0 and {12**-0.5:.4f}")
    halflives = [parse_count(text) for text in halflife or ()]
    if not all(isinstance(count, int) and count > 0 for count in halflives):
        raise UsageError(f"--halflife {' '.join(halflife or ())}: write a number of images above 0, such as 50M")
    profiles = [*map(Power, sigma_rel or ()), *map(Traditional, halflives)]
    if not profiles:
        raise UsageError("which average? say --sigma-rel or --halflife")
    weights, run, time, fits = snapshot.synthesize(folder, profiles, parse_count(nimg) if nimg else None)
    rows = snapshot.control_rows(folder)
    for profile, tensors, fit in zip(profiles, weights, fits, strict=True):
        path = snapshot.path_for(out or folder / "ema", time, profile)
        snapshot.write(path, tensors, time, profile, run, rows)
        _say(f"{profile} at image {time:,}: {path}  ({fit})")
    last = f"halflife={halflives[-1]}" if halflives else f"sigma_rel={sigma_rel[-1]:g}"
    instead = " sample.halflife=null" if run.sample.halflife and not halflives else ""
    _say(f"next:\n  gesso sample {folder} sample.{last}{instead}")


@app.command()
def report(folder: RunFolder, out: Out = None) -> None:
    """One self-contained HTML page on a run, from the files in its folder."""
    from gesso.report import write

    _say(f"wrote {write(folder, out)}")


@app.command()
def data(
    where: Annotated[
        str, typer.Argument(metavar="SOURCE", help="what data.source takes, or a cache", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="the sheet of pictures to write")] = Path("sheet.png"),
    rows: Annotated[int, typer.Option(min=1, max=100, help="images on the sheet")] = 8,
    views: Annotated[int, typer.Option(min=1, max=12, help="of each image")] = 4,
    crop_scale: Annotated[
        str | None, typer.Option(help="shares of the area, such as .4,.6; the middle square by default", show_default=False)
    ] = None,
    flip: Annotated[bool, typer.Option("--flip", help="mirror half of the views")] = False,
    resolution: Annotated[int | None, typer.Option(min=1, help="of the views", show_default=False)] = None,
    limit: Annotated[int, typer.Option(min=1, help="headers and captions to read")] = 5_000,
    seed: Annotated[int, typer.Option(min=0, help="of the views, as in a cache")] = 0,
    vae: Annotated[str | None, typer.Option(help="to show latents with", show_default=False)] = None,
    convention: Annotated[str, typer.Option(help="of these latents: dit or edm2")] = "dit",
) -> None:
    """What a source of images or a cache holds: counts, sizes, classes, captions, and a sheet of views to look at."""
    from gesso import files
    from gesso.data.sheet import Asked, examined, sheet

    asked = Asked(rows, views, _shares(crop_scale), flip, resolution, seed, vae, convention)
    tables, pictures, notes = examined(where, limit, asked)
    for table in tables:
        _print_table(*table)
    with files.whole(out) as temporary:
        sheet(pictures).save(temporary, "PNG")
    for note in notes:
        _say(f"note: {note}")
    _say(f"wrote {out}")


def _shares(text: str | None) -> tuple[float, float] | None:
    """.4,.6"""
    try:
        low, high = map(float, text.split(",")) if text else (1.0, 1.0)
    except ValueError:
        low = high = 0.0
    if not 0 < low <= high <= 1:
        raise UsageError(f"--crop-scale {text}: write two shares of the area, the smaller one first, such as .4,.6")
    return (low, high) if text else None


def _print_table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Cells are what users wrote: nothing in them is markup."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD if any(header) else None, show_header=any(header), show_edge=False, pad_edge=False
    )
    for n, name in enumerate(header):
        table.add_column(name, justify="right" if name else "left", overflow="fold", min_width=6 if n == 0 else None)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(Text(title, "bold"), table, "", sep="\n")


@app.command()
def models(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME ...]", help="some of them; all by default")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Parameters and FLOPs of every network beside the published figures."""
    import json

    from gesso.nets.count import render, table

    rows = table(names)
    _say(json.dumps([row._asdict() for row in rows], indent=1) if as_json else render(rows))


@app.command()
def recipes() -> None:
    """The recipes, one line each."""
    from gesso.recipes import RECIPES

    for name, make in RECIPES.items():
        _say(f"{name:21} {(make.__doc__ or '').strip().splitlines()[0]}")
    _say("\ngesso show RECIPE prints one whole; gesso train RECIPE a.b=c changes it")


@app.command()
def show(recipe: str, settings: Overrides = None) -> None:
    """The resolved settings of a recipe, run.yaml or run folder, as YAML, with what each is and its equation."""
    from gesso import config
    from gesso import recipes as known

    run, notes = known.resolve(recipe, list(settings or ()))
    for note in notes:
        errors.print(f"note: {note}", markup=False)
    sys.stdout.write(config.explained(run))


@app.command()
def diff(a: str, b: str) -> None:
    """Where two runs or recipes differ."""
    from gesso import config
    from gesso import recipes as known

    left, right = (known.resolve(name, [])[0] for name in (a, b))
    rows = config.differences(left, right)
    for path, old, new in rows:
        _say(f"{path}: {old!r} -> {new!r}")
    if not rows:
        _say("no difference")


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
