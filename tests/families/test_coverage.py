"""Every class that an Auto class maps for a shipped family is pruned, or is a bigger model with the tower in it."""

from __future__ import annotations

import pytest
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_vitprune.families import Family, all_families
from hf_vitprune.modeling.hosts import HOSTS
from hf_vitprune.modeling.registry import AUTO_CLASSES, stock_classes
from tiny import CASES

SHIPPED = [family for family in all_families() if not family.model_type.startswith("toy")]
#: in their own module: to look through all of transformers is to import all of its models
AUTOS = {name: auto for name, auto in vars(modeling_auto).items() if name.startswith("Auto") and auto._model_mapping}


def mapped(family: Family) -> dict[str, set[str]]:
    """Auto class -> names of the classes that it maps for the family's config."""
    found = {}
    for name, auto in AUTOS.items():
        classes = auto._model_mapping.get(CONFIG_MAPPING[family.model_type], ())
        found[name] = {one.__name__ for one in (classes if isinstance(classes, tuple) else (classes,))}
    return {name: classes for name, classes in found.items() if classes}


@pytest.mark.parametrize("family", SHIPPED, ids=lambda family: family.model_type)
def test_every_class_that_is_mapped_is_pruned(family: Family) -> None:
    ours = {stock.__name__ for stock in stock_classes(family)}
    hosts = {name for classes in HOSTS.values() for name in classes}
    for name, classes in mapped(family).items():
        for one in classes - ours:
            assert one in hosts and one in family.refused_classes, f"{name} maps {one}"
        assert classes <= hosts or name in AUTO_CLASSES, f"{name} maps {classes} and not the pruned twins"


@pytest.mark.parametrize("family", SHIPPED, ids=lambda family: family.model_type)
def test_every_pruned_class_is_in_the_common_tests(family: Family) -> None:
    assert {stock.__name__ for stock in stock_classes(family)} <= {case.model_class for case in CASES.values()}
