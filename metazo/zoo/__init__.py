"""The zoo: find, check, pull, publish and import tuners, and models published as step logs."""

from metazo.zoo.find import Check, entries, find, latest, named, tuners, verify
from metazo.zoo.importer import import_pth, model_shapes
from metazo.zoo.index import Entry, Found
from metazo.zoo.log import Log
from metazo.zoo.publish import push, push_log
from metazo.zoo.signature import signer
from metazo.zoo.sources import load, load_feedback, opened, pull, read, zoo_base

__all__ = [
    "Check",
    "Entry",
    "Found",
    "Log",
    "entries",
    "find",
    "import_pth",
    "latest",
    "load",
    "load_feedback",
    "model_shapes",
    "named",
    "opened",
    "pull",
    "push",
    "push_log",
    "read",
    "signer",
    "tuners",
    "verify",
    "zoo_base",
]
