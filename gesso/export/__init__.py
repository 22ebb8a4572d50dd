"""Export runs for other tools: pipeline folders of diffusers, EDM2's state dicts, and exported programs of torch."""

from collections.abc import Callable
from pathlib import Path

from gesso.config import RunConfig
from gesso.errors import UsageError
from gesso.export import edm2_file, native, pipeline_folder, program

FORMATS: dict[str, Callable[[Path, RunConfig, Path, int | None], list[str]]] = {
    "diffusers": pipeline_folder.write_pipeline,
    "diffusers-native": native.write_native,
    "edm2": edm2_file.write_state,
    "torch-export": program.write_program,
}
"""Functions (run folder, settings, output, nimg) that write an export and return lines for the user."""


def export_run(folder: Path, run: RunConfig, out: Path, format_name: str, nimg: int | None = None) -> list[str]:
    """Export the EMA weights that `sample.*` selects; return a report as lines.

    Args:
        folder: Run folder.
        run: Settings of the run.
        out: Folder or file to write.
        format_name: One of FORMATS.
        nimg: Number of images that the weights were trained on; None is the last snapshot.

    Raises:
        UsageError: The format does not exist, or cannot represent the run.
    """
    if format_name not in FORMATS:
        raise UsageError(f"--format {format_name}: there is no such format; use {', '.join(FORMATS)}")
    return FORMATS[format_name](folder, run, out, nimg)
