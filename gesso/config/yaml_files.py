"""Read YAML of other people: bounded size, depth and expansion of aliases, and plain values only."""

import re
from pathlib import Path
from typing import Any

import yaml

from gesso import untrusted

MAX_NODES = 1_000_000
"""Maximum number of values after aliases are expanded."""
MAX_BRACKETS = 500
"""Maximum number of open brackets."""
MAX_DEPTH = 50
"""Maximum depth of nested values."""


def load_yaml(path: Path) -> Any:
    """Return the value in a YAML file.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is no regular file, too large, no YAML, or nested too deeply, also through aliases.
    """
    return parse_yaml(untrusted.read_bytes(path, untrusted.MAX_YAML_BYTES).decode("utf-8"))


def parse_yaml(text: str) -> Any:
    """Return the value of YAML; errors as for `load_yaml`."""
    depth = 0
    for bracket in re.finditer(r"[\[\]{}]", text):  # PyYAML takes seconds to find this out
        depth += 1 if bracket[0] in "[{" else -1
        if depth > MAX_BRACKETS:
            raise ValueError("it is nested too deeply")
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if node is None:
            return None
        _count_nodes(node, {}, 0)
        return yaml.constructor.SafeConstructor().construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error).splitlines()[0]) from None
    except (TypeError, KeyError, AttributeError, OverflowError) as error:  # of PyYAML's constructors of odd scalars
        raise ValueError(f"it has a value that is not valid ({error})") from None


def _count_nodes(node: yaml.Node, counts: dict[int, int], depth: int) -> int:
    """Return the number of values in a node, with aliases expanded. Raises ValueError above the bounds."""
    if depth > MAX_DEPTH:
        raise ValueError("it is nested too deeply, or an alias contains itself")
    if id(node) not in counts:
        children = node.value if isinstance(node, yaml.SequenceNode) else ()
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        counts[id(node)] = 1 + sum(_count_nodes(child, counts, depth + 1) for child in children)
        if counts[id(node)] > MAX_NODES:
            raise ValueError(f"it has more than {MAX_NODES:,} values")
    return counts[id(node)]
