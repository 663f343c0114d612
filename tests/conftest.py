"""Settings shared by every test, and the conformance table at the end of a run."""

import functools
import gc
import importlib
import inspect
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch

# The models are tiny: a thread pool costs more than it saves, and fights with pytest-xdist.
torch.set_num_threads(1)


ANNOTATIONS_CHECKED = {
    "test_likelihoods", "test_optim_averages", "test_preconditioner",
    "test_row_forms", "test_rules", "test_sampled", "test_truncated",
}  # fmt: skip
"""Files of tests that run with the package's shape annotations enforced, beside the conformance tests in float32.

Together they call every annotated module. Checking takes as long as the work on tiny models.
"""

jaxtyped = jaxtyping.jaxtyped


called: list[Callable[..., Any]] = []
checks: dict[Any, Callable[..., Any]] = {}


def relay(*args: Any, **kwargs: Any) -> Any:
    return called[-1](*args, **kwargs)


def checked_when_asked(**options: Any) -> Callable[[Any], Any]:
    """`jaxtyping.jaxtyped` that makes the check of a function at its first checked call, and once.

    Making one takes a millisecond: of every function at import, and of every inner function at each call around it.
    """

    config = jaxtyping.config  # no global, which torch.compile would look for in the module that THEIRS names

    def decorate(function: Any) -> Any:
        if not inspect.isfunction(function):
            return jaxtyped(function, **options)

        def call(*args: Any, **kwargs: Any) -> Any:
            __tracebackhide__ = True
            if config.jaxtyping_disable:
                return function(*args, **kwargs)
            if function.__code__ not in checks:
                # Annotations are looked up where the function was written.
                own = types.FunctionType(relay.__code__, {**function.__globals__, "called": called})
                checks[function.__code__] = jaxtyped(functools.wraps(function)(own), **options)
            called.append(function)
            try:
                return checks[function.__code__](*args, **kwargs)
            finally:
                called.pop()

        return functools.wraps(function)(types.FunctionType(call.__code__, THEIRS, closure=call.__closure__))

    return decorate


THEIRS = {**globals(), "__name__": "jaxtyping"}  # a warning looks for the user's line by the names of modules
jaxtyping.jaxtyped = checked_when_asked  # where the import hook of --jaxtyping-packages looks


def check_annotations(check: bool) -> None:
    """Whether the shape annotations of the package are enforced from now on."""
    jaxtyping.config.update("jaxtyping_disable", not check)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    check_annotations(item.path.stem in ANNOTATIONS_CHECKED)


# What thousands of tests and their imports hold would be looked through again and again.
gc.disable()


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def without_waiting_for_the_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)  # slow, and of use after a power cut only
        yield


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "fisher.safetensors"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return text_models().make_tokenizer(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="session")
def classifier(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small BERT; to be read only."""
    return text_models().saved(text_models().make_classifier(), tokenizer, tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="session")
def tasks(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders a and b of two models, their texts, and their Fisher files; to be read only."""
    made, root = text_models(), tmp_path_factory.mktemp("tasks")
    data = made.jsonl(
        root / "texts.jsonl", [{"text": t, "label": n} for t, n in zip(made.TEXTS, made.LABELS, strict=True)]
    )
    for seed, name in enumerate("ab"):
        made.saved(made.make_classifier(seed), tokenizer, root / name)
        result = importlib.import_module("tests.commands").run(
            "estimate",
            root / name,
            "--data",
            data,
            "--structure",
            "kfac",
            "--batch-size",
            "2",
            "--out",
            root / f"{name}.fisher",
        )
        assert result.exit_code == 0, result.output
    return root


def text_models() -> Any:
    """Not imported before it is needed, since transformers takes seconds."""
    return importlib.import_module("tests.text_models")


def pytest_configure(config: pytest.Config) -> None:
    # torch's note on the cost of uneven padding, which one family has on purpose.
    config.addinivalue_line("filterwarnings", "ignore:Using padding='same' with even kernel lengths:UserWarning")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line for each structure and dtype of what the conformance tests recorded (`conformance_cases.entry`)."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for report in terminalreporter.getreports("passed"):
        for name, found in report.user_properties:
            if name == "conformance":
                groups[found["structure"], found["dtype"], found["device"]].append(found)
    if not groups:
        return
    everything = [found for group in groups.values() for found in group]
    families, kinds = ({found[axis] for found in everything} for axis in ("family", "kind"))
    cells = sum(found["operations"] for found in everything)
    terminalreporter.section("conformance with the brute-force reference")
    terminalreporter.line(f"{len(families)} families, {len(kinds)} kinds, {len(everything):,} Fishers, {cells:,} cells")
    terminalreporter.line(
        f"{'structure':<14}{'dtype':<10}{'device':<8}{'Fishers':>8}{'cells':>9}  worst relative error"
    )
    for labels, group in sorted(groups.items(), key=lambda item: (item[0][1:], item[0][0])):
        worst = max(group, key=lambda found: found["error"])
        cells = sum(found["operations"] for found in group)
        counts = "{:<14}{:<10}{:<8}".format(*labels) + f"{len(group):>8,}{cells:>9,}"
        terminalreporter.line(f"{counts}  {worst['error']:.1e}  ({worst['where']})")
