"""Files: safetensors with a JSON description in the header, written whole or not at all.

`atomic` puts a finished file under its name, `checksums` tells it from a damaged one, `tensors` writes one safetensors
file or many; `state` describes an operator as a tree of named tensors, `fisher_file` is the format of it, of which only
those tensors are read that are asked for, and `parts` writes such a file part by part; `record` says which pieces of
such work are finished; `model_files` reads and writes
models' weights, which have no description.
Nothing here knows what an operator means; ``operators.persistence`` turns a `State` back into an operator. Pickle is
never used.
"""

from fisherkit.io.atomic import as_path, check_folder, leftovers, part_folder, replace_text, replacing, require_folder
from fisherkit.io.checksums import CHECKSUM, parse
from fisherkit.io.fisher_file import FisherHeader, Node, Reader, State, read, read_header, write
from fisherkit.io.parts import PartsFile, is_closed, parts_finished, record_of
from fisherkit.io.record import differing, read_record, write_record
from fisherkit.io.tensors import FORMAT, read_tensors, replace_checked_file

__all__ = [
    "CHECKSUM", "FORMAT", "FisherHeader", "Node", "PartsFile", "Reader", "State", "as_path", "check_folder",
    "differing", "is_closed", "leftovers", "parse", "part_folder", "parts_finished", "read", "read_header",
    "read_record", "read_tensors", "record_of", "replace_checked_file", "replace_text", "replacing", "require_folder",
    "write", "write_record",
]  # fmt: skip
