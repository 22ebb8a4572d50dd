"""One self-contained HTML page on a run, from the files in its folder: no network, no other file needed."""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from gesso import config, files
from gesso.config import Run
from gesso.errors import UsageError
from gesso.train.log import read as read_log

INK, ACCENT, SOFT = "#2b2a27", "#b4532a", "#8a8578"

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #faf8f4; color: #2b2a27; font: 16px/1.55 Georgia, 'Times New Roman', serif; }
main { max-width: 1060px; margin: 0 auto; padding: 48px 24px 80px; }
h1 { font-size: 40px; font-weight: 400; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 21px; font-weight: 400; margin: 52px 0 14px; padding-top: 14px; border-top: 1px solid #ddd6c9; }
p, li { max-width: 68ch; } .sub { color: #6d685d; margin: 6px 0 30px; }
.cards { display: flex; flex-wrap: wrap; gap: 14px; }
.card { background: #fff; border: 1px solid #e6e0d4; border-radius: 6px; padding: 14px 20px; min-width: 150px; }
.card b { display: block; font-size: 28px; font-weight: 400; } .card span { color: #6d685d; font-size: 14px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(330px, 1fr)); gap: 26px; }
figure { margin: 0; } figcaption { color: #6d685d; font-size: 14px; margin-top: 8px; }
img, svg { max-width: 100%; height: auto; } figure img { width: 100%; image-rendering: pixelated; border-radius: 4px; }
table { border-collapse: collapse; font-size: 15px; } td, th { text-align: right; padding: 5px 18px 5px 0; font-weight: 400; }
td:first-child, th:first-child { text-align: left; } th { color: #6d685d; border-bottom: 1px solid #ddd6c9; }
pre { background: #fff; border: 1px solid #e6e0d4; border-radius: 6px; padding: 16px; overflow-x: auto; font-size: 13px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 20px; font-size: 15px; margin: 0; }
dt { color: #6d685d; } dd { margin: 0; } code { font-size: 14px; } summary { cursor: pointer; color: #6d685d; }
"""


def write(folder: Path, out: Path | None = None) -> Path:
    """Write report.html for a run folder and return its path.

    Raises UsageError when the folder holds no run, or matplotlib is missing.
    """
    if not (folder / "run.yaml").is_file() or not (folder / "log.jsonl").is_file():
        raise UsageError(f"{folder} holds no trained run (run.yaml and log.jsonl); train one first")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("reports need matplotlib: pip install 'gesso[plots]'") from None
    run, lines = config.read(folder / "run.yaml"), read_log(folder / "log.jsonl")
    metrics = json.loads((folder / "metrics.json").read_text()) if (folder / "metrics.json").is_file() else {}
    body = [_head(folder, run, lines, metrics), _samples(folder, run), _scores(metrics), _lengths(metrics)]
    body += [_training(lines), _recipe(run)]
    title = html.escape(f"{folder.name} - gesso")
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )
    target = out or folder / "report.html"
    files.write_text(target, page)
    return target


def _card(value: str, what: str) -> str:
    return f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(what)}</span></div>'


def _head(folder: Path, run: Run, lines: list[dict[str, Any]], metrics: dict[str, Any]) -> str:
    steps = [line for line in lines if "loss" in line]
    seen = steps[-1]["nimg"] if steps else 0
    data = run.data
    classes = f"{data.num_classes} classes" if data.num_classes else "no classes"
    cards = [_card(f"{seen:,}", "images seen")]
    if "class_agreement" in metrics:
        cards.append(_card(f"{metrics['class_agreement']:.1%}", f"class agreement, guidance {run.sample.guidance:g}"))
        if "unguided" in metrics:
            cards.append(_card(f"{metrics['unguided']['class_agreement']:.1%}", "class agreement, unguided"))
            cards.append(_card(f"{metrics['unguided']['frechet_distance']:.2f}", "Frechet distance, unguided"))
        cards.append(_card(f"{metrics['frechet_distance']:.2f}", f"Frechet distance, guidance {run.sample.guidance:g}"))
        cards.append(_card(f"{metrics['floor']['frechet_distance']:.2f}", "its floor, real against real"))
    return (
        f"<h1>{html.escape(folder.name)}</h1>"
        f'<p class="sub">{html.escape(run.net.name)} under {html.escape(run.process.name)}, recipe {html.escape(run.recipe)}: '
        f"{data.num_images:,} images of {data.resolution}&times;{data.resolution}&times;{data.channels}, {classes}</p>"
        f'<div class="cards">{"".join(cards)}</div>'
    )


def _image(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}"><figcaption>{html.escape(caption)}</figcaption></figure>'


def _samples(folder: Path, run: Run) -> str:
    made, near = folder / "samples" / "by-class.png", folder / "samples" / "nearest.png"
    if not made.is_file():
        return f"<h2>Samples</h2><p>None measured yet: <code>gesso evaluate {html.escape(str(folder))}</code></p>"
    rows = "A row for each class. " if run.data.num_classes else ""
    cfg = run.sample
    length = f"half-life {cfg.halflife:,}" if cfg.halflife else f"sigma_rel {cfg.sigma_rel:g}"
    caption = f"Samples. {rows}{cfg.sampler}, {cfg.steps} steps, guidance {cfg.guidance:g}, EMA of {length}."
    nearest = "The training image nearest to each sample, in pixels: what it would look like to have copied."
    return f'<h2>Samples</h2><div class="pair">{_image(made, caption)}{_image(near, nearest) if near.is_file() else ""}</div>'


def _row(*cells: str, tag: str = "td") -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"


def _distance(row: dict[str, float]) -> str:
    return f"{row['frechet_distance']:.3f} \u00b1 {row['frechet_distance_std']:.3f}"


def _scores(metrics: dict[str, Any]) -> str:
    protocol = metrics.get("protocol", {})
    if protocol.get("features") == "shapes":
        return _read_back(metrics) + _protocol(protocol)
    if "class_agreement" not in metrics:
        return ""
    rows = [_row("", "class agreement", "Frechet distance", tag="th")]
    rows.append(_row(f"guidance {protocol['guidance']:g}", f"{metrics['class_agreement']:.1%}", _distance(metrics)))
    if "unguided" in metrics:
        rows.append(_row("unguided", f"{metrics['unguided']['class_agreement']:.1%}", _distance(metrics["unguided"])))
    rows.append(
        _row("real against real (floor)", f"{metrics['real']['class_agreement']:.1%}", _distance(metrics["floor"]))
    )
    return f"<h2>Scores</h2><table>{''.join(rows)}</table>" + _protocol(protocol)


def _read_back(metrics: dict[str, Any]) -> str:
    """Shares of pictures whose shapes are as their caption or class says."""
    rows = [_row("", *metrics["real"], tag="th")]
    titles = {
        "guided": f"guidance {metrics['protocol']['guidance']:g}",
        "unguided": "unguided",
        "real": "real pictures",
    }
    for name, title in titles.items():
        if name in metrics:
            rows.append(_row(title, *(f"{rate:.1%}" for rate in metrics[name].values())))
    return f"<h2>What is drawn</h2><table>{''.join(rows)}</table>"


def _protocol(protocol: dict[str, Any]) -> str:
    terms = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in protocol.items())
    return f"<h2>Protocol</h2><dl>{terms}</dl>"


def _lengths(metrics: dict[str, Any]) -> str:
    sweep = metrics.get("ema_sweep", {})
    rows = sweep.get("rows", [])
    if not rows:
        return ""
    x, y = [r["sigma_rel"] for r in rows], [r["frechet_distance"] for r in rows]
    spread = [r["frechet_distance_std"] for r in rows]
    figure, axes = _axes("EMA length, relative standard deviation", "Frechet distance")
    axes.fill_between(
        x,
        [a - b for a, b in zip(y, spread, strict=True)],
        [a + b for a, b in zip(y, spread, strict=True)],
        color=ACCENT,
        alpha=0.15,
        lw=0,
    )
    axes.plot(x, y, "o-", color=ACCENT, lw=1.6, ms=5, label="samples")
    axes.axhline(metrics["floor"]["frechet_distance"], color=SOFT, ls="--", lw=1, label="floor")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    how = f"guidance {sweep['guidance']:g}, {sweep['sampler']}, {sweep['steps']} steps"
    text = (
        f"Each length rebuilt after training from the stored averages (EDM2 Section 3), {how}; "
        f"the band is the spread over halves of the real images."
    )
    return f"<h2>Quality against EMA length</h2><figure>{_svg(figure)}<figcaption>{html.escape(text)}</figcaption></figure>"


def _training(lines: list[dict[str, Any]]) -> str:
    steps = [line for line in lines if "loss" in line]
    skipped = next((line["unreadable"] for line in lines if "unreadable" in line), [])
    parts = ["<h2>Training</h2>"]
    if steps:
        figure, axes = _axes("images seen (thousands)", "loss")
        axes.plot([s["nimg"] / 1000 for s in steps], [s["loss"] for s in steps], color=ACCENT, lw=1.4)
        parts.append(
            f"<figure>{_svg(figure)}<figcaption>Mean training loss between log lines, in the weighting of the recipe.</figcaption></figure>"
        )
    if skipped:
        names = ", ".join(html.escape(name) for name, _ in skipped[:20])
        parts.append(f"<p>{len(skipped)} unreadable images were left out: {names}</p>")
    return "".join(parts)


def _recipe(run: Run) -> str:
    made = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in run.made_with.items())
    settings = html.escape(config.to_yaml(run))
    return f"<h2>Made with</h2><dl>{made}</dl><h2>Recipe</h2><details open><summary>run.yaml</summary><pre>{settings}</pre></details>"


def _axes(x: str, y: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e0d4", lw=0.8)
    return figure, axes


def _svg(figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
