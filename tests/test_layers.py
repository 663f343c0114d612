"""The package's inner order: operators are asked what they can, not what they are, and imports go down only."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import fisherkit.operators
from fisherkit.operators import FisherOperator, ForwardingOperator, forwarding
from fisherkit.operators.base import HOOKS

PACKAGE = Path(fisherkit.__file__).parent
OPERATORS = PACKAGE / "operators"
MOST = 5
WITHOUT = ("likelihoods.py", "vectors.py")
"""Modules beside folders whose methods need no docstring where they do what the contract says."""
CLASSES = {name for name in fisherkit.operators.__all__ if name.endswith("Operator")} - {"FisherOperator"}


def names_in(node: ast.AST) -> set[str]:
    found = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return found | {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}


def class_tests(path: Path) -> Iterator[str]:
    """Places that tell operators by their class: isinstance, issubclass, a comparison of types, a case of a match."""
    for node in ast.walk(ast.parse(path.read_text())):
        call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        asked: set[str] = set()
        if call and node.func.id in {"isinstance", "issubclass"}:  # type: ignore[attr-defined]
            asked = names_in(node.args[1])  # type: ignore[attr-defined]
        elif isinstance(node, ast.Compare) and "type" in names_in(node.left):
            asked = set().union(*map(names_in, node.comparators))
        elif isinstance(node, ast.MatchClass):
            asked = names_in(node.cls)
        if asked & CLASSES:
            yield f"{path.relative_to(PACKAGE)}:{node.lineno}"  # type: ignore[attr-defined]


def test_operators__are_hardly_ever_told_by_their_class() -> None:
    found = [place for path in PACKAGE.rglob("*.py") for place in class_tests(path)]
    assert len(found) <= MOST, found
    assert all(place.startswith("operators/") for place in found), found


def imports_of(path: Path) -> set[str]:
    """Modules of the operators that one imports when it runs; what only annotations need does not count."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in names_in(node.test):
            node.body = []
    modules = {f.stem for f in OPERATORS.glob("*.py")}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "fisherkit.operators":
            found |= {alias.name for alias in node.names} & modules
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fisherkit.operators."):
            found.add(str(node.module).rpartition(".")[2])
    return found


def test_operators__import_in_no_circle_but_that_of_sums() -> None:
    below = {path.stem: imports_of(path) for path in OPERATORS.glob("*.py") if path.stem != "__init__"}
    below["base"].remove("composite")  # F + G is made of sums, which are operators themselves
    while free := [name for name, needs in below.items() if not needs & set(below)]:
        for name in free:
            del below[name]
    assert not below


def test_forwarding__forgets_no_hook() -> None:
    public = {"save", "solve", "factorize", "coverage"}
    assert not public & set(HOOKS)
    abstract = FisherOperator.__abstractmethods__
    assert abstract <= set(HOOKS)
    for name in set(HOOKS) - {"_blocks_of_node"}:  # asked of a class
        own = vars(ForwardingOperator)[name]
        asks = own.fget if isinstance(own, property) else own
        assert asks.__code__.co_filename == forwarding.__file__, name
    structures = [cls for name, cls in vars(fisherkit.operators).items() if name in CLASSES]
    overridden = {name for cls in structures for name in vars(cls) if name in vars(FisherOperator)}
    own = {name for name in overridden if not name.startswith("__")} - {"tag", "other_tags", "_from_state", "_abc_impl"}
    assert own <= set(HOOKS)


def test_methods__have_a_docstring_of_their_own_or_that_of_the_contract() -> None:
    missing = []
    folders = [PACKAGE / folder for folder in ("operators", "rows", "structures", "influence")]
    files = [*(file for folder in folders for file in folder.glob("*.py")), *map(PACKAGE.joinpath, WITHOUT)]
    for path in files:
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        module = importlib.import_module(name)
        for cls in (c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__):
            for name, member in vars(cls).items():
                own = inspect.isfunction(member) and member.__name__ == name  # not a field's default
                method = own or isinstance(member, (property, classmethod, staticmethod))
                if method and not name.startswith("_") and not inspect.getdoc(getattr(cls, name)):
                    missing.append(f"{cls.__qualname__}.{name}")
    assert not missing


def private_names(path: Path) -> Iterator[str]:
    """Names that PyTorch and Python keep to themselves, by attribute or import."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr):
            root: ast.AST = node
            while isinstance(root, ast.Attribute):
                root = root.value
            if names_in(root) & {"torch", "F", "nn", "Variable", "sys"} or node.attr.startswith("_saved_"):
                yield node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            words = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            yield from (word for word in words if re.match("_[^_]", word))


def test_private_interfaces__are_those_of_the_table() -> None:
    page = (PACKAGE.parent / "docs" / "design.md").read_text()
    rows = page.split("## Private interfaces of PyTorch")[1].split("\n## ")[0].splitlines()
    listed = {name for row in rows if row.startswith("| `") for name in re.findall("`(.+?)`", row.split("|")[1])}
    assert listed == {name for path in PACKAGE.rglob("*.py") for name in private_names(path)}
