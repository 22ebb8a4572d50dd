"""Sources of images: folders, zips, webdataset tars, parquet files and toy sources.

`open_source` opens any of them. A `Source` returns undecoded images with label and caption by index.
"""

from gesso.data.sources.base import IMAGE_SUFFIXES, Source, SourceItem
from gesso.data.sources.registry import NAMED_SOURCES, SOURCE_KINDS, open_source, split_uri

__all__ = ["IMAGE_SUFFIXES", "NAMED_SOURCES", "SOURCE_KINDS", "Source", "SourceItem", "open_source", "split_uri"]
