"""Addresses of caches on object storage: the allowed schemes, and addresses that a recorded run names.

fsspec opens far more than storage: some of its file systems execute code, read local files or start programs. Only the
schemes listed here reach it.
"""

import ipaddress
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from gesso.config.overrides import flatten
from gesso.config.run import RunConfig
from gesso.errors import UsageError

ADDRESS_SCHEMES = ("s3", "s3a", "gs", "gcs", "https", "http")
"""Schemes of addresses that gesso opens."""
ADDRESS_SETTINGS = (
    "data.source",
    "monitor.validation_source",
    "eval.validation_source",
    "eval.reference",
    "eval.prompts",
)
"""Settings that name images or captions."""


def is_address(uri: str | Path) -> bool:
    """Return True for an address such as s3://bucket/cache, False for a path or a name."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|[^/]*::.*://", str(uri), re.DOTALL) is not None


def check_address(uri: str) -> str:
    """Return the scheme of an address in lower case.

    Raises:
        UsageError: The scheme is not allowed, or several addresses are chained with `::`.
    """
    scheme = uri.partition("://")[0].lower()
    if "::" in uri:
        raise UsageError(f"{uri}: refused, because it chains file systems with ::; write one address")
    if scheme not in ADDRESS_SCHEMES:
        known = ", ".join(f"{name}://" for name in ADDRESS_SCHEMES)
        raise UsageError(f"{uri}: {scheme}:// is refused; write a path, or an address that begins with {known}")
    return scheme


def is_local_host(uri: str) -> bool:
    """Return True if a web address names this machine or a private network; host names are not resolved."""
    try:
        parts = urlsplit(uri)
        host = (parts.hostname or "").rstrip(".")
    except ValueError:
        return True
    if parts.scheme.lower() not in ("http", "https"):
        return False
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        # Digits and dots that are not a normal address (127.1, 0x7f000001) are other spellings of one.
        return "." not in host or host.endswith((".localhost", ".local", ".internal")) or not re.search("[g-z]", host)


def confirm_addresses(run: RunConfig, arguments: Sequence[str], allowed: bool) -> None:
    """Raise UsageError if the run takes an address from a file, which nobody typed or confirmed.

    Args:
        run: Settings, merged from a recorded run and the arguments.
        arguments: Arguments a.b=c, which were typed, and YAML files, which were not.
        allowed: True if the user passed --allow-addresses.
    """
    if allowed:
        return
    values = flatten(run)
    for name in ADDRESS_SETTINGS:
        value = values[name]
        if value is None or f"{name}={value}" in arguments:
            continue
        if not is_address(value) and not value.startswith("hub:"):
            continue
        kind = "an address of this machine or a private network" if is_local_host(value) else "an address"
        raise UsageError(
            f"the recorded run has {name}={value}, {kind}: nothing was fetched.\n"
            f"Add --allow-addresses if you trust it, or type {name}={value} yourself."
        )
