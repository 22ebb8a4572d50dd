"""Upload of a run to the Hugging Face Hub, with a model card (`gesso push`)."""

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gesso import api, config, hub, sampling, snapshot
from gesso.config import RunConfig
from gesso.errors import UsageError, error_summary
from gesso.evaluation import results
from gesso.report.render import render_template
from gesso.safetensors_io import read_metadata, read_tensors, write_tensors

CARD = Path(__file__).parent / "report" / "templates" / "card.md"
NUM_SAMPLES = 16


class PushArgs(NamedTuple):
    """Arguments of `gesso push`.

    repo: OWNER/NAME on the Hub.
    private: True creates a private repository.
    license: licence of the weights, such as cc-by-nc-4.0; None states none.
    all_snapshots: True uploads all snapshots, from which EMA weights of any length and time can be reconstructed;
        False uploads the last of each tracked EMA.
    samples: True draws images for the card.
    """

    repo: str
    private: bool = False
    license: str | None = None
    all_snapshots: bool = False
    samples: bool = True


def push(folder: Path, args: PushArgs, log: Callable[[str], None] = lambda text: None) -> str:
    """Upload a run with its model card and return its address.

    Local paths are replaced by their last part in all files. The token is that of `hf auth login` or HF_TOKEN.

    Raises:
        UsageError: There is no run, the name is not OWNER/NAME, or the Hub refused the upload.
    """
    hub_id = hub.parse_hub_id(args.repo if args.repo.startswith("hub:") else f"hub:{args.repo}")
    assert hub_id is not None  # the text begins with hub:
    client = hub.import_client().HfApi()
    with tempfile.TemporaryDirectory() as staging:
        files = stage(folder, args, Path(staging), hub_id.repo)
        log(f"uploading {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:,.1f} MB")
        try:
            client.create_repo(hub_id.repo, private=args.private, exist_ok=True)
            client.upload_folder(
                repo_id=hub_id.repo,
                folder_path=staging,
                commit_message="Upload a run of gesso",
                revision=hub_id.revision,
            )
        except Exception as error:  # of the hub's client, of its HTTP library, or of the disk
            login = " (log in with hf auth login, or set HF_TOKEN)" if "401" in str(error) else ""
            raise UsageError(f"{hub_id.repo}: the upload failed: {error_summary(error)}{login}") from None
    return f"{client.endpoint}/{hub_id.repo}"


def stage(folder: Path, args: PushArgs, out: Path, repo: str) -> list[Path]:
    """Write the files of the upload to `out` and return them.

    Raises:
        UsageError: There is no run in `folder`, or it has no snapshots.
    """
    run = api.load_run(folder)
    public = config.validate(without_paths(config.to_dict(run.config)))
    config.save_config(public, out / "run.yaml")
    stored = snapshot.list_snapshots(folder)
    for entry in stored if args.all_snapshots else [s for s in stored if s.nimg == stored[-1].nimg]:
        header = json.loads(read_metadata(entry.path)["gesso"]) | {"run": config.to_dict(public)}
        path = out / "snapshots" / entry.path.name
        write_tensors(path, read_tensors(entry.path), {"gesso": json.dumps(header)})
    for path in sorted((folder / "code").glob("*.py")):
        (out / "code").mkdir(exist_ok=True)
        (out / "code" / path.name).write_bytes(path.read_bytes())
    if (folder / "metrics.json").is_file():
        metrics = without_paths(json.loads((folder / "metrics.json").read_text(encoding="utf-8")))
        (out / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    if args.samples:
        images = run.sample(seeds=range(NUM_SAMPLES))
        sampling.save_png(sampling.image_grid(images, columns=8), out / "samples.png")
    (out / "README.md").write_text(render_card(folder, public, repo, args), encoding="utf-8")
    return sorted(path for path in out.rglob("*") if path.is_file())


def without_paths(value: Any) -> Any:
    """Return settings or metrics with every local path replaced by its last part."""
    if isinstance(value, Mapping):
        return {without_paths(name): without_paths(part) for name, part in value.items()}
    if isinstance(value, list):
        return [without_paths(part) for part in value]
    is_path = isinstance(value, str) and ("/" in value or "\\" in value)
    if is_path and (Path(value).expanduser().is_absolute() or Path(value).exists() or value.startswith(("./", "../"))):
        return Path(value).name
    return value


def render_card(folder: Path, run: RunConfig, repo: str, args: PushArgs) -> str:
    """Return the model card: how to use the run, samples, metrics with their protocol, training and citation."""
    evaluations = [
        {"values": {name: f"{value:.4g}" for name, value in entry.best().items()}, "protocol": _protocol(entry)}
        for entry in results.read_evaluations(folder).values()
    ]
    last = snapshot.list_snapshots(folder)[-1]
    no_parameters = {snapshot.CONTROL_ROWS, *last.buffers}
    parameters = sum(value.numel() for name, value in read_tensors(last.path).items() if name not in no_parameters)
    context = {
        "repo": repo,
        "name": repo.split("/")[1],
        "license": args.license,
        "run": run,
        "nimg": last.nimg,
        "parameters": parameters,
        "data": _describe_data(run),
        "any_length": args.all_snapshots,
        "evaluations": evaluations,
        "num_samples": NUM_SAMPLES if args.samples else 0,
        "condition": {"label": "labels=[0]", "text": 'prompts=["a photo"]'}.get(run.semantic.kind, ""),
        "code": run.environment.get("code", ""),
    }
    return render_template(CARD, context)


def _describe_data(run: RunConfig) -> str:
    """Return source, number, size and classes of the training images in words."""
    kind = {"label": f", {run.data.num_classes} classes", "text": ", with captions"}.get(run.semantic.kind, "")
    return (
        f"`{run.data.source}`, {run.data.num_images or 0:,} images at {run.data.resolution}x{run.data.resolution}{kind}"
    )


def _protocol(evaluation: results.Evaluation) -> str:
    """Return the settings of an evaluation that decide what its numbers mean, on one line."""
    protocol = without_paths(dict(evaluation.protocol))
    shown = ("num_samples", "sampler", "steps", "guidance", "sigma_rel", "nimg", "reference")
    return ", ".join(f"{name} {protocol[name]}" for name in shown if protocol.get(name) is not None)
