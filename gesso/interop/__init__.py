"""Other projects' weights, as plain dicts of tensors, in and out of our networks.

net, notes = gesso.interop.load(state_dict)  # heads=... where the weights do not tell them
"""

from collections.abc import Mapping

from torch import Tensor, nn

from gesso import nets
from gesso.errors import RunError, UsageError
from gesso.interop import dit, edm2, pixart, sd3, unet

READERS = (edm2, dit, pixart, sd3, unet)
"""Modules with `matches(keys)` and `convert(state, heads) -> Found`, asked in order."""


def load(state: Mapping[str, Tensor], heads: int | None = None) -> tuple[nn.Module, dict[str, str]]:
    """Recognise whose weights these are; return our network with them, in evaluation mode, and notes.

    heads: attention heads of a network, which no shape tells without qk-norm; None: those of the published
    size. Raises UsageError when the source is unknown, or heads are needed or do not fit; RunError that lists
    what is missing or unknown.
    """
    keys = set(state)
    for reader in READERS:
        if reader.matches(keys):
            cfg, inputs, weights, notes = reader.convert(state, heads)
            break
    else:
        shown = ", ".join(sorted(keys)[:3])
        raise UsageError(f"weights of no project that gesso knows (tensors such as {shown})")
    net = nets.build(cfg, inputs)
    if wrong := nets.misfit(net, weights):
        raise RunError(f"{notes['source']}: {wrong}")
    net.load_state_dict(dict(weights))
    return net.eval(), notes
