"""Files: safetensors with a JSON description in the header, written whole or not at all.

`atomic` puts a finished file under its name, `checksums` tells it from a damaged one, `reader` describes an operator as
a tree of named tensors and reads only those that are asked for, `shards` writes one file or many, `fisher_file` is the
format itself; `model_files` reads and writes models' weights, which have no description. Nothing here knows what an
operator means; ``operators.persistence`` turns a `State` back into an operator. Pickle is never used.
"""

from fisherkit.io.atomic import (
    FORMAT,
    as_path,
    check_folder,
    leftovers,
    part_folder,
    part_of,
    read_tensors,
    replace_checked_file,
    replace_text,
)
from fisherkit.io.checksums import CHECKSUM, parse, seal
from fisherkit.io.fisher_file import SHARDED_VERSION, VERSION, FisherHeader, read, read_header, write
from fisherkit.io.reader import Node, Place, Reader, State

__all__ = [
    "CHECKSUM",
    "FORMAT",
    "SHARDED_VERSION",
    "VERSION",
    "FisherHeader",
    "Node",
    "Place",
    "Reader",
    "State",
    "as_path",
    "check_folder",
    "leftovers",
    "parse",
    "part_folder",
    "part_of",
    "read",
    "read_header",
    "read_tensors",
    "replace_checked_file",
    "replace_text",
    "seal",
    "write",
]
