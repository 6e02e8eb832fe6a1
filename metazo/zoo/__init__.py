"""The zoo: find, check, pull, publish and import tuners."""

from metazo.zoo.importer import import_pth, model_shapes
from metazo.zoo.index import Entry, Found
from metazo.zoo.publish import push
from metazo.zoo.search import Check, find, named, tuners, verify
from metazo.zoo.sources import load, pull

__all__ = [
    "Check",
    "Entry",
    "Found",
    "find",
    "import_pth",
    "load",
    "model_shapes",
    "named",
    "pull",
    "push",
    "tuners",
    "verify",
]
