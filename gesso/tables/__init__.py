"""Tables and figures of the papers as data, and the commands that make them. `TABLES` is the list of them."""

from collections.abc import Callable

from gesso import config
from gesso.errors import UsageError
from gesso.tables import berrada, edm2, edm2_averages, edm2_costs, edm2_training, own
from gesso.tables.table import Table

MODULES = (berrada, edm2, edm2_costs, edm2_averages, edm2_training, own)
TABLES: dict[str, Callable[[], Table]] = {make().name: make for module in MODULES for make in module.TABLES}


def table_of(name: str) -> Table:
    """Raises UsageError for a name that there is not."""
    if name not in TABLES:
        raise UsageError(f"no table {name!r} (gesso table list has them all); {config.nearest(name, list(TABLES))}")
    return TABLES[name]()
