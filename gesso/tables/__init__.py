"""Tables and figures of the papers as data, and the commands that make them. `TABLES` is the list of them."""

from collections.abc import Callable

from gesso import config
from gesso.errors import UsageError
from gesso.tables import (
    berrada,
    berrada_networks,
    berrada_rates,
    berrada_resolution,
    berrada_summary,
    berrada_text,
    berrada_transfer,
    edm2,
    edm2_averages,
    edm2_costs,
    edm2_training,
    own,
)
from gesso.tables.table import Table

MODULES = (
    berrada, berrada_text, berrada_transfer, berrada_resolution, berrada_networks, berrada_rates, berrada_summary,
    edm2, edm2_costs, edm2_averages, edm2_training, own,
)  # fmt: skip
TABLES: dict[str, Callable[[], Table]] = {make().name: make for module in MODULES for make in module.TABLES}


def table_of(name: str) -> Table:
    """Raises UsageError for a name that there is not."""
    if name not in TABLES:
        raise UsageError(f"no table {name!r} (gesso table list has them all); {config.nearest(name, list(TABLES))}")
    return TABLES[name]()
