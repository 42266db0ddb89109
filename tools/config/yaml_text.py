"""Read YAML strictly: no key twice, no alias, no Python object, and 2:4 as text."""

from typing import Any

import yaml

DEEPEST = 20
"""How many lists and mappings may lie in each other."""


class NotYaml(ValueError):
    """Text that is not strict YAML; the message names the line if it is known."""


def load_yaml(text: str | bytes) -> Any:
    """Read a YAML document.

    Raises:
        NotYaml: It can't be read.
    """
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # PyYAML raises anything, for example at 2020-13-45 and !!bool x
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise NotYaml(f"{line}not YAML: {problem}") from None


class _Loader(yaml.SafeLoader):
    """The safe loader, made strict."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse an alias, since a list may contain itself through one, and deep nesting."""
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "an alias (*name); write it out", mark)
        if self._depth == DEEPEST:
            problem = f"lists and mappings more than {DEEPEST} deep"
            raise yaml.composer.ComposerError(None, None, problem, mark)

        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_whole(self, node: yaml.ScalarNode) -> int | str:
        """Read 2:4 as text; YAML 1.1 reads it to base 60, as 124."""
        return node.value if ":" in node.value else self.construct_yaml_int(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that is given twice."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                problem = f"the key {key!r} is there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole)
