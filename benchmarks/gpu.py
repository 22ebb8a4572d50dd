"""Measure a GPU in one command: training, sampling, memory, EMA, loading and two ranks, as one JSON and one page.

    python benchmarks/gpu.py --minutes 10 --out gpu

writes gpu.json and gpu.md after every measurement. On a machine without CUDA it runs on the CPU; `--size tiny` takes
networks of a few thousand weights, which the tests use. A measurement that fails, such as for lack of memory, is
recorded with its error, and one that no time is left for is recorded as such.

- training, forward: EDM2, DiT and mmDiT (`--size XL`: EDM2-S, DiT-XL/2 and SD3's mmDiT of that width) in bfloat16,
  eager and compiled, against diffusers' classes or the tests' reference, and against the floor: the time of the matrix
  products, convolutions and attention alone. Peers, floor and gesso are interleaved, and ratios are those of medians.
- MFU: model FLOPs (6 per multiply-accumulate and training image, 2 in a forward pass) relative to a large matrix
  product.
- memory: static memory as `gesso train --estimate` predicts it against that of tensors on the device, and the peak at
  the largest micro-batch against its extrapolation from smaller ones.
- step: cost of EMAs, of drawing a batch, and host synchronizations in a training step.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import engine
import networks
import torch

from gesso import atomic_io, recipes
from gesso.data.synthetic import with_synthetic_data
from gesso.training import estimate
from gesso.training.ranks import SINGLE_PROCESS
from gesso.training.throughput import measure_matmul_flops
from gesso.training.trainer import Trainer

CASES = ("edm2", "dit", "mmdit")
RECIPES = {"tiny": "digits-dit", "S": "in1k-256-dit", "XL": "in1k-256-dit"}
"""Recipe of the measurements of memory and of the training step, by size."""
Row = dict[str, Any]


def describe_machine(device: str) -> Row:
    """Return the names and versions of what is measured, and its matrix products in TFLOPs/s."""
    row: Row = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        row |= {
            "device": properties.name,
            "devices": torch.cuda.device_count(),
            "memory, GB": round(properties.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
        }
    else:
        row["device"] = platform.processor() or "cpu"
    for precision in ("bfloat16", "full"):
        run = recipes.resolve("digits", [f"train.precision={precision}"])[0]
        row[f"matrix products in {precision}, TFLOPs/s"] = round(
            measure_matmul_flops(run, torch.device(device)) / 1e12, 3
        )
    return row


def measure_network(name: str, options: argparse.Namespace, peak_tflops: float, **changes: object) -> Row:
    """Return the ratios of a network, at the largest batch size of 1, 2, 4, ..., options.batch that fits."""
    batch = options.batch
    while True:
        arguments = argparse.Namespace(**(vars(options) | changes | {"batch": batch}))
        try:
            row = networks.measure_case(name, arguments)
            return row | {"MFU": float(f"{float(row['model TFLOPs/s']) / peak_tflops:.3g}")}
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            if batch == 1:
                raise
            batch //= 2


def build_trainer(options: argparse.Namespace) -> Trainer:
    """Return a trainer on random data."""
    settings = [f"train.batch_size={options.batch}", f"train.device={options.device}"]
    if options.size == "tiny":
        settings += ["net.hidden_size=32", "net.depth=1", "net.num_heads=2"]
    if options.size == "S":
        settings += ["net.hidden_size=384", "net.depth=12", "net.num_heads=6"]
    if options.device == "cuda":
        settings.append("train.precision=bfloat16")
    run, dataset = with_synthetic_data(recipes.resolve(RECIPES[options.size], settings)[0])
    return Trainer(run, dataset, SINGLE_PROCESS, torch.device(options.device))


def measure_memory(options: argparse.Namespace) -> Row:
    """Return predicted and measured bytes, static and at the peak."""
    trainer = build_trainer(options)
    device = trainer.device
    predicted = sum(estimate.static_memory(trainer.run).values())
    measurements = estimate.StepMeasurements()
    sizes = [size for size in (1, 2, 4, 8, 16, 32) if size <= options.batch]
    for size in sizes:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        estimate.set_batch_size(trainer, size)
        trainer.micro_batch_size = size
        trainer.step()
        measurements.peak_bytes[size] = estimate.peak_memory(device)
    held = sum(estimate.memory_by_category(trainer).values())
    row = {"static predicted, MB": predicted / 1e6, "static held, MB": held / 1e6, "static ratio": predicted / held}
    if len(sizes) > 2:
        actual = measurements.peak_bytes.pop(sizes[-1])
        extrapolated = measurements.predict_peak(held, sizes[-1])
        row |= {
            f"peak extrapolated to {sizes[-1]}, MB": extrapolated / 1e6,
            f"peak at {sizes[-1]}, MB": actual / 1e6,
            "peak ratio": extrapolated / actual,
        }
    return {name: round(value, 3) for name, value in row.items()}


def measure_step(options: argparse.Namespace) -> Row:
    """Return a training step in images/s, the share of its EMAs and of drawing a batch, and host synchronizations."""
    trainer = build_trainer(options)
    sample_index = torch.arange(options.batch, device=trainer.device)
    candidates: dict[str, Callable[[], object]] = {
        "step": trainer.step,
        "EMAs": lambda: trainer.ema.update(1000, 1000 + options.batch),
        "batch": lambda: trainer.batcher(sample_index),
    }
    median = engine.median_seconds(candidates, options.rounds, options.device)
    row: Row = {"images/s": round(options.batch / median["step"], 2)}
    row |= {f"{name} / step": round(median[name] / median["step"], 4) for name in ("EMAs", "batch")}
    if options.device == "cuda":
        row["host synchronizations per step"] = count_synchronizations(trainer.step)
    return row


def count_synchronizations(function: Callable[[], object]) -> int:
    """Return how often a function makes the host wait for the GPU, as torch reports it."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def measure_ranks(options: argparse.Namespace) -> Row:
    """Return the images/s of two ranks relative to one rank with the same batch."""
    out = options.out.with_suffix(".ranks.json")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        str(Path(__file__).with_name("engine.py")), "ranks", "--device", options.device, "--batch", str(options.batch),
        "--rounds", str(options.rounds), "--out", str(out),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(out.read_text())


def to_markdown(report: dict[str, Any]) -> str:
    """Return the page: the machine, and a table for each kind of measurement."""
    lines = ["# Measurements of a device", "", *(f"- {name}: {value}" for name, value in report["machine"].items())]
    for title, rows in report["measurements"].items():
        lines += ["", f"## {title}", ""]
        measured = [row for row in rows if "error" not in row]
        columns = list(dict.fromkeys(name for row in measured for name in row))
        if measured:
            lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
            lines += ["| " + " | ".join(str(row.get(name, "")) for name in columns) + " |" for row in measured]
        lines += [f"- not measured, {row['case']}: {row['error']}" for row in rows if "error" in row]
    return "\n".join(lines) + "\n"


def write(report: dict[str, Any], out: Path) -> None:
    """Write OUT.json and OUT.md."""
    atomic_io.write_json(out.with_suffix(".json"), report)
    atomic_io.write_text(out.with_suffix(".md"), to_markdown(report))


def jobs(options: argparse.Namespace, peak_tflops: float) -> list[tuple[str, str, Callable[[], Row]]]:
    """Return (title, name, function) of all measurements in order of value."""
    result: list[tuple[str, str, Callable[[], Row]]] = []
    compiled = (False,) if options.no_compile else (False, True)

    def network(name: str, sample: bool, compile_: bool) -> Callable[[], Row]:
        return lambda: measure_network(name, options, peak_tflops, sample=sample, compile=compile_)

    for compile_ in compiled:
        for sample, title in ((False, "Training steps"), (True, "Forward passes of sampling")):
            for name in CASES:
                label = f"{name}, {'compiled' if compile_ else 'eager'}"
                result.append((title, label, network(name, sample, compile_)))
        if not compile_:
            result.append(("Memory", "memory", lambda: measure_memory(options)))
            result.append(("Training loop", "step", lambda: measure_step(options)))
    if options.device == "cuda" and torch.cuda.device_count() > 1:
        result.append(("Two ranks", "ranks", lambda: measure_ranks(options)))
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all measurements that fit into the time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--no-compile", action="store_true")
    networks.add_options(parser)
    parser.set_defaults(
        device="cuda" if cuda else "cpu", dtype="bfloat16" if cuda else "float32", size="XL" if cuda else "tiny",
        batch=32 if cuda else 4,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    machine = describe_machine(options.device)
    precision = "full" if options.dtype == "float32" else "bfloat16"
    peak_tflops = machine[f"matrix products in {precision}, TFLOPs/s"]
    report: dict[str, Any] = {"machine": machine, "measurements": {}}
    for title, name, function in jobs(options, peak_tflops):
        if time.monotonic() > deadline:
            row: Row = {"case": name, "error": "no time was left; raise --minutes"}
        else:
            try:
                row = {"case": name} | function()
            except Exception as error:  # one failing measurement must not lose the others
                row = {"case": name, "error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        print(title, row, flush=True)
        report["measurements"].setdefault(title, []).append(row)
        write(report, options.out)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
