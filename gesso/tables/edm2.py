"""Tables and figures of Karras et al. 2024."""

from collections.abc import Callable

from gesso.tables.table import Table

TABLES: tuple[Callable[[], Table], ...] = ()
