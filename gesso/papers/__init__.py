"""Tables and figures of the papers and of this project, as data. `TABLES` lists all of them."""

from gesso.papers.berrada2024 import conditioning, learning_rates, networks, resolution, summary, text, transfer
from gesso.papers.edm2 import costs, ema, training
from gesso.papers.edm2 import tables as edm2_tables
from gesso.papers.gesso import tables as gesso_tables
from gesso.reproduce.schema import Tables

MODULES = (
    conditioning,
    text,
    transfer,
    resolution,
    networks,
    learning_rates,
    summary,
    edm2_tables,
    costs,
    ema,
    training,
    gesso_tables,
)
TABLES: Tables = {build().name: build for module in MODULES for build in module.TABLES}
"""every table by name, in the order of `gesso reproduce list`"""
