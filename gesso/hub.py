"""Downloads from the Hugging Face Hub, written hub:OWNER/NAME or hub:OWNER/NAME@REVISION."""

import importlib
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gesso.errors import UsageError, error_summary, install_command

RUN_FILES = ("run.yaml", "metrics.json", "README.md", "snapshots/*.safetensors", "code/*.py")
"""Files of a run folder that `gesso push` uploads and `fetch_run` downloads."""


class HubId(NamedTuple):
    """Repository OWNER/NAME of the Hub at a revision; None is the newest."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"hub:{self.repo}" + (f"@{self.revision}" if self.revision else "")


def parse_hub_id(uri: str) -> HubId | None:
    """Return the repository of hub:OWNER/NAME[@REVISION]; None if the text does not begin with "hub:".

    Raises:
        UsageError: The text begins with "hub:" and is not such a name.
    """
    if not uri.startswith("hub:"):
        return None
    match = re.fullmatch(r"hub:(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", uri)
    if not match or ".." in uri:
        raise UsageError(f"{uri}: write hub:OWNER/NAME, or hub:OWNER/NAME@REVISION")
    return HubId(match[1], match[2])


def import_client() -> Any:
    """Return the module huggingface_hub. Raises UsageError if it is not installed."""
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise UsageError(f"the Hub needs huggingface_hub: {install_command('hub')}") from None


def download(
    hub_id: HubId, repo_type: str = "model", patterns: Sequence[str] | None = None, folder: Path | None = None
) -> Path:
    """Download a repository and return its local folder.

    Args:
        hub_id: The repository.
        repo_type: "model" or "dataset".
        patterns: Globs of the files; None for all.
        folder: Folder to write to; None for the cache of huggingface_hub.

    Raises:
        UsageError: The repository or its revision does not exist, or the download failed.
    """
    try:
        path = import_client().snapshot_download(
            hub_id.repo,
            repo_type=repo_type,
            revision=hub_id.revision,
            allow_patterns=list(patterns) if patterns else None,
            local_dir=folder,
        )
    except UsageError:
        raise
    except Exception as error:  # of the hub's client, of its HTTP library, or of the disk
        raise UsageError(f"{hub_id}: the download failed ({error_summary(error)})") from None
    return Path(path)


def fetch_run(uri: str | Path) -> Path:
    """Return the run folder that `uri` names; hub:OWNER/NAME is downloaded to runs/OWNER--NAME if it is not there.

    A revision is part of the name of the folder. Delete the folder to download a newer version.

    Raises:
        UsageError: The download failed, or the repository has no run of gesso.
    """
    hub_id = parse_hub_id(str(uri))
    if hub_id is None:
        return Path(uri)
    name = hub_id.repo.replace("/", "--") + (f"@{hub_id.revision.replace('/', '--')}" if hub_id.revision else "")
    folder = Path("runs") / name
    if (folder / "run.yaml").is_file():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    download(hub_id, patterns=RUN_FILES, folder=partial)
    if not (partial / "run.yaml").is_file():
        shutil.rmtree(partial)
        raise UsageError(f"{uri} has no run of gesso: it has no run.yaml")
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    partial.rename(folder)
    return folder
