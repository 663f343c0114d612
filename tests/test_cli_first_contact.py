"""The commands as somebody meets them who types them for the first time: words, widths, defaults, bars, bytes."""

import csv
import importlib
import inspect
import json
import os
import re
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.models import OptionInfo
from typer.testing import Result

import fisherkit as fk
from fisherkit import merging
from fisherkit.cli import COMMANDS
from fisherkit.cli.command import error_in_flags, in_flags
from fisherkit.cli.text import pairs, table
from tests.commands import own_module, run

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # vmap over fused attention

NAMES = [command.name for command in COMMANDS]
MERGE = COMMANDS[NAMES.index("merge")]


def estimated(root: Path, name: str, out: Path, *others: str) -> Result:
    return run(
        "estimate", root / name, "--data", root / "texts.jsonl", "--structure", "kfac", "--batch-size", "2", *others,
        "--out", out,
    )  # fmt: skip


def merged(root: Path, first: str, second: str, out: Path, *others: str) -> Result:
    return run(
        "merge", "--model", root / "a", "--fisher", root / f"{first}.fisher", "--model", root / "b", "--fisher",
        root / f"{second}.fisher", "--out", out, *others,
    )  # fmt: skip


# -- help --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", *NAMES])
def test_help__is_there_by_both_names_and_within_80_columns(name: str) -> None:
    arguments = [name] if name else []
    short, long = (run(*arguments, option) for option in ("-h", "--help"))
    assert short.exit_code == 0
    assert short.stdout == long.stdout
    assert max(map(len, short.stdout.splitlines())) <= 80


@pytest.mark.parametrize("command", COMMANDS, ids=NAMES)
def test_help__says_every_default(command: Any) -> None:
    for name, parameter in command.signature.parameters.items():
        options = [
            entry for entry in getattr(parameter.annotation, "__metadata__", ()) if isinstance(entry, OptionInfo)
        ]
        if options and not isinstance(parameter.default, bool) and parameter.default is None:
            assert isinstance(options[0].show_default, str), name


def test_help__of_merge_says_the_defaults_of_the_package() -> None:
    text = " ".join(run("merge", "--help").stdout.split())
    for function, only in ((merging.merge, ""), (merging.regmean, "regmean")):
        for name, parameter in inspect.signature(function).parameters.items():
            value = parameter.default
            if name not in MERGE.flags or value in (None, False, inspect.Parameter.empty) or name == "other_weights":
                continue
            shown = f"{value.scale:g}" if isinstance(value, fk.RelativeDamping) else str(value)
            line = text.split(f" {MERGE.flags[name]} ")[1].split("]")[0]
            assert shown in line.partition("[default:")[2], (only, name)


# -- tables ------------------------------------------------------------------------------------------------------------


def widest(text: str) -> int:
    return max(map(len, text.splitlines()))


def test_table__fits_a_terminal_and_loses_nothing() -> None:
    name = "bert.encoder.layer.11.attention.output.LayerNorm.weight"
    rows = [(name, "a sentence of words " * 5, "1,234"), ("x", "y", "9")]
    found = table(("layer", "meaning", "numbers"), rows, left=2)
    assert widest(found) <= 80
    lines = found.splitlines()
    first = lines[1].split("  ")[0].count("-")
    assert "".join(line[:first].strip() for line in lines[2:-1]) == name
    assert [line.split()[-1] for line in (lines[2], lines[-1])] == ["1,234", "9"]
    whole = pairs([("key", "word " * 40), ("longer key", "x" * 100)])
    assert widest(whole) <= 80
    assert whole.split().count("word") == 40


def test_commands__print_within_80_columns(tasks: Path, tmp_path: Path) -> None:
    for result in (
        run("info"),
        run("show", tasks / "a.fisher"),
        merged(tasks, "a", "b", tmp_path / "m", "--verbose"),
        run("audit", tasks / "a.fisher", tasks / "b.fisher"),
    ):
        assert result.exit_code == 0, result.output
        lines = [line for line in result.stdout.splitlines() if str(tmp_path) not in line and str(tasks) not in line]
        assert max(map(len, lines)) <= 80, result.stdout


# -- options -----------------------------------------------------------------------------------------------------------

BAD = [
    ("--device", "foo", ("'--device': 'foo'", "a device of this machine: cpu", "fisherkit info")),
    ("--device", "meta", ("'--device': 'meta'",)),
    ("--structure", "KFAC", ("'--structure': 'KFAC'", "Try: kfac.")),
    ("--kind", "x", ("'--kind': 'x'", "there is no kind 'x'")),
    ("--kind", "sgd", ("'--kind': 'sgd' is not one of ef, ief",)),
    ("--kind", "truncated:0", ("'--kind': 'truncated:0'",)),
    ("--example", "Token", ("'--example': 'Token'", "Try: token.")),
    ("--normalization", "avg", ("'--normalization': 'avg'",)),
    ("--kfac-positions", "x", ("'--kfac-positions': 'x'",)),
    ("--likelihood", "x", ("'--likelihood': 'x'", "categorical")),
    ("--dtype", "x", ("'--dtype': 'x'", "float32")),
    ("--dtype", "int8", ("'--dtype': 'int8'", "float32")),
    ("--out", "no/f", ("--out: got a folder that does not exist: no", "Try: mkdir -p no.")),
]
PYTHON = re.compile(r"Path\(|RelativeDamping|\bNone\b|fk\.|\b\w+=['\"\w]")


@pytest.mark.parametrize(("option", "value", "words"), BAD, ids=lambda value: str(value)[:20])
def test_estimate__refuses_options_before_the_model_is_loaded(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, value: str, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)

    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("fisherkit.cli.sources.Folder.open", load)
    out = () if option == "--out" else ("--out", "f")
    result = run("estimate", tasks / "a", "--data", tasks / "texts.jsonl", *out, option, value)
    usage = option != "--out"  # else what is on the disk
    assert result.exit_code == 1 + usage, result.output
    assert ("Invalid value for" if usage else "error: fisherkit estimate") in result.stderr
    for word in words:
        assert word in result.stderr
    assert not PYTHON.search(result.stderr), result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "arguments", "words"),
    [
        (2, "--normalize foo", ("'--normalize': 'foo'", "none")),
        (2, "--uncovered x", ("'--uncovered': 'x'", "average")),
        (2, "--integers average", ("'--integers': 'average'",)),
        (2, "--damping -1", ("'--damping'", "0")),
        (1, "--damping 0 --normalize none --output-damping 0", ("singular", "Try: --damping 1e-6, which leaves")),
        (1, "--tolerance 3", ("--tolerance 3",)),
        (2, "--device foo", ("'--device': 'foo'",)),
        (2, "--method Auto", ("Try: auto",)),
        (2, "--dtype float99", ("bfloat16",)),
        (2, "--weights 1,two", ('is not "examples" or a list',)),
        (1, "--center nowhere", ("nowhere",)),
        (1, "--weights 1,2,3", ("3 weights",)),
        (1, "--out no/m", ("Try: mkdir -p no",)),
    ],
)
def test_merge__refuses_in_the_commands_own_words(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, arguments: str, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = arguments.split()
    result = run(
        "merge", "--model", tasks / "a", "--fisher", tasks / "a.fisher", "--model", tasks / "b", "--fisher",
        tasks / "b.fisher", *(() if "--out" in given else ("--out", "m")), *given,
    )  # fmt: skip
    assert result.exit_code == code, result.output
    for word in words:
        assert word in result.stderr
    assert not PYTHON.search(result.stderr), result.stderr
    assert list(tmp_path.iterdir()) == []


FLAGS = {"damping": "--damping", "uncovered": "--uncovered", "overwrite": "--overwrite", "out": "--out",
         "normalize": "--normalize", "weights": "--weights", "dtype": "--dtype", "params": "--params",
         "structure": "--structure", "center": "--center", "kind": "--kind"}  # fmt: skip


@pytest.mark.parametrize(
    ("python", "typed"),
    [
        ('uncovered="average", or "first"', '--uncovered average, or "first"'),
        ('policy=MergePolicy(uncovered="average"), or "first"', '--uncovered average, or "first"'),
        ("damping=fk.RelativeDamping(1e-6), which leaves", "--damping 1e-6, which leaves"),
        ("damping > 0, or damping=fk.RelativeDamping(1e-6)", "damping > 0, or --damping 1e-6"),
        ("normalize=None for Fishers", "--normalize none for Fishers"),
        ("weights=[1.0, 1.0], which is the same", "--weights 1,1, which is the same"),
        ("weights=[N_1, N_2, ...]", "--weights N_1,N_2,..."),
        ("dtype=torch.float32, the dtype of the result", "--dtype float32, the dtype of the result"),
        ("Fishers built with the same params=, without", "Fishers built with the same --params, without"),
        ("another out=, or overwrite=True", "another --out, or --overwrite"),
        ("fk.ExactFisher or fk.SampledFisher for unlabelled data", "--kind exact or --kind sf for unlabelled data"),
        ("model.eval()", "model.eval()"),
        ("max_wait=3, some_damping=2", "max_wait=3, some_damping=2"),
    ],
)
def test_flags__are_what_the_package_says_to_python(python: str, typed: str) -> None:
    assert in_flags(python, FLAGS) == typed


@pytest.mark.parametrize(
    ("python", "typed"),
    [
        ('structure="kfac" or "diagonal", or a larger memory_budget=', '--structure kfac or "diagonal"'),
        ('storage="rows"; a larger one, or storage="stream", or weights=None', "a larger one, or --weights none"),
        ('policy=MergePolicy(uncovered="average"), or "first"', '--uncovered average, or "first"'),
        ("group=False", ""),
        ("fk.merging.line_search, with a loss; fk.ExactFisher", "--kind exact"),
    ],
)
def test_flags__only_ways_that_the_command_has_are_advised(python: str, typed: str) -> None:
    error = fk.InvalidArgumentError("merge", "x", "a number, or None", try_=python)
    said = f"fisherkit merge: got x; expected a number.{' Try: ' * bool(typed)}{typed}{'.' * bool(typed)}"
    assert error_in_flags(error, "fisherkit merge", FLAGS) == said


@pytest.mark.parametrize(
    ("call", "typed"),
    [
        ("TruncatedFisher", "fisherkit estimate"),
        ("merge, Fisher 1", "fisherkit estimate, Fisher 1"),
        ('merge(uncovered="refuse")', "fisherkit estimate --uncovered refuse"),
        ('merge(weights="examples", normalize=None)', "fisherkit estimate --weights examples --normalize none"),
        ("open_file('f')", "open_file('f')"),
        ("data, batch 3", "data, batch 3"),
    ],
)
def test_flags__the_command_takes_the_place_of_the_call(call: str, typed: str) -> None:
    error = fk.InvalidArgumentError(call=call, got="x")
    assert error_in_flags(error, "fisherkit estimate", FLAGS) == f"{typed}: got x."


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("quality m:f --kinds foo", "'--kinds': 'foo'"),
        ("quality m:f --structures KFAC", "'--structures': 'KFAC' is not one of full,"),
        ("quality m:f --likelihood x", "'--likelihood': 'x'"),
        ("quality m:f --example x", "'--example': 'x'"),
        ("quality m:f --dampings small", "'small' is not a list of numbers"),
        ("audit a b --compare foo", "'--compare': 'foo'"),
        ("scores a --damping -1", "'--damping'"),
        ("scores a --kind sgd", "'sgd' is not one of ef, ief,"),
        ("scores a --measurement logit", "loss, margin"),
        ("scores a --normalize norm", "relatif"),
        ("scores a --structure EKFAC", "Try: ekfac"),
        ("scores a --device foo", "'--device': 'foo'"),
        ("scores a --dtype x", "'--dtype': 'x'"),
    ],
)
def test_commands__refuse_options_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments.split())
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert not PYTHON.search(result.stderr), result.stderr


# -- texts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", "a sparse matrix,linalg\ngraph,fft\n", ("first line is 'a sparse matrix', 'linalg'", "'text,label'")),
        ("t.tsv", "a sparse matrix\tlinalg\n", ("first line is 'a sparse matrix', 'linalg'", "header")),
        ("t.csv", "text;label\na;fft\n", ("first line is 'text;label'", "'text,label'")),
        ("t.csv", "text,label\na sparse, matrix,linalg\n", ("line 2 of t.csv with 1 more cells", "quotes")),
        ("t.csv", "text,label\na sparse matrix\n", ("line 2 of t.csv, where 'label' is null or not there",)),
        ("t.csv", "text,label,text\na,fft,b\n", ("two columns 'text'",)),
        ("t.csv", "", ("is empty",)),
        ("t.jsonl", '{"text": "a", "label": 0}\n{"text": null, "label": 1}\n', ("line 2", "'text' is null")),
        ("t.jsonl", '{"text": "a", "label": null}\n', ("line 1", "'label' is null")),
        ("t.jsonl", '{"text": 3, "label": 1}\n', ("no string",)),
        ("t.tsv", 'text\tlabel\n"graph\tfft\ndense\tfft\nmatrix" of\tfft\n', ("line 4 of t.tsv", "not closed")),
        ("t.tsv", 'text\tlabel\ngraph\tfft\n"dense\tfft\nof\tfft\n', ("line 4 of t.tsv", "not closed")),
        ("t.csv", f"text,label\n{'a ' * 70_000},fft\n", ("line 2 of t.csv", "field larger", ".jsonl")),
        ("t.csv", b"text,label\nd\xe9j\xe0,fft\n", ("not UTF-8", "byte 12", "iconv")),
        ("t.jsonl", '{"text": "a", "label": 0}'.encode("utf-16"), ("not UTF-8", "byte 0")),
        ("t.jsonl", b'{"text": "a \\ud800", "label": 0}\n', ("surrogate pair in line 1",)),
        ("t.jsonl", '{"text": "a", "label": ' + "[" * 100_000 + "\n", ("line 1", "not JSON")),
        ("t.jsonl", '{"text": "a", "label": 1' + 400 * "0" + "}\n", ("in line 1", "a class from 0 to 2")),
    ],
    ids=lambda value: str(value)[:30],
)
def test_texts__what_is_wrong_is_named(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str | bytes,
    words: tuple[str, ...],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    result = run("estimate", tasks / "a", "--data", name, "--out", "f")
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: fisherkit estimate --data: got ")
    assert len(result.stderr) < 1000
    for word in words:
        assert word in result.stderr


def test_texts__with_commas_in_quotes_are_read(tasks: Path, tmp_path: Path) -> None:
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("text", "label", "other"), ("a sparse, matrix", "linalg", ""), ("graph", "fft", "")]
        )
    result = run("estimate", tasks / "a", "--data", tmp_path / "t.csv", "--out", tmp_path / "f", "--json")
    assert json.loads(result.stdout)["examples"] == 2


# -- merge -------------------------------------------------------------------------------------------------------------


def test_merge__ends_in_three_lines_and_has_the_table_behind_verbose(tasks: Path, tmp_path: Path) -> None:
    short = merged(tasks, "a", "b", tmp_path / "m")
    assert short.exit_code == 0, short.output
    assert short.stderr == ""
    lines = short.stdout.splitlines()
    assert len(lines) == 3
    assert re.fullmatch(r"merge of 2 models, [\d.]+ s: 25 merged", lines[0])
    assert re.fullmatch(r"14 blocks solved, damping 0.03, residual at most .*e-1\d", lines[1])
    assert lines[2] == f"Wrote {tmp_path / 'm'}."
    long = merged(tasks, "a", "b", tmp_path / "n", "--verbose").stdout
    assert "classifier.weight, classifier.bias" in long
    assert "closed_form" in long
    assert long.splitlines()[-1] == f"Wrote {tmp_path / 'n'}."


@pytest.mark.parametrize("method", ["auto", "regmean"])
def test_merge__fishers_of_other_weights_are_refused_unless_a_flag_says_so(
    tasks: Path, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "m"
    result = merged(tasks, "b", "a", out, "--method", method)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: fisherkit merge --other-weights refuse: got Fishers of other weights: ")
    for word in ("Fisher 1", "at those of model 2", "another order of fishers", "--other-weights warn"):
        assert word in result.stderr
    assert list(tmp_path.iterdir()) == []
    allowed = merged(tasks, "b", "a", out, "--method", method, "--other-weights", "warn")
    assert allowed.exit_code == 0, allowed.output
    assert allowed.stderr.count("was measured at other parameters") == 2
    assert allowed.stderr.count("warning: ") == 2
    assert ".py" not in allowed.stderr
    assert (out / "model.safetensors").exists()
    assert merged(tasks, "a", "b", tmp_path / "n", "--method", method).exit_code == 0


# -- bytes -------------------------------------------------------------------------------------------------------------


def test_estimate__the_same_twice_is_the_same_bytes(tasks: Path, tmp_path: Path) -> None:
    """safetensors writes a header's entries in an order that is drawn in each call."""
    found = set()
    for i in range(3):
        assert estimated(tasks, "a", tmp_path / f"f{i}").exit_code == 0
        found.add((tmp_path / f"f{i}").read_bytes())
    assert len(found) == 1
    content = found.pop()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])
    assert len(content) == 8 + length + max(entry["data_offsets"][1] for n, entry in header.items() if n[0] != "_")


def test_estimate__the_same_twice_is_the_same_bytes_in_shards(tasks: Path, tmp_path: Path) -> None:
    contents = []
    for folder in (tmp_path / "x", tmp_path / "y"):
        folder.mkdir()
        assert estimated(tasks, "a", folder / "f", "--max-shard-size", "600").exit_code == 0
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert len(contents[0]) > 2
    assert contents[0] == contents[1]
    assert estimated(tasks, "b", tmp_path / "x" / "f", "--max-shard-size", "600", "--overwrite").exit_code == 0
    assert torch.equal(fk.load(tmp_path / "x" / "f").diagonal(), fk.load(tasks / "b.fisher").diagonal())


# -- bars --------------------------------------------------------------------------------------------------------------

SLOW = """
import time

import torch
from torch import nn


class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 2)

    def forward(self, x):
        time.sleep(0.12)
        return self.net(x)


def make():
    torch.manual_seed(0)
    return Slow(), [(torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(4)]
"""


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_module(tmp_path, monkeypatch, "slow_first_contact", SLOW)


def on_a_terminal(folder: Path, columns: int, *arguments: str | Path) -> str:
    """What a terminal of so many columns shows."""
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
    pid, terminal = pty.fork()
    if pid == 0:  # the command
        os.chdir(folder)
        os.environ |= {"PYTHONPATH": str(Path(fk.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        os.execv(sys.executable, [sys.executable, "-m", "fisherkit", *map(str, arguments)])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
    shown = b""
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # the other side is gone
            break
        if not piece:
            break
        shown += piece
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0, shown.decode()
    return shown.decode()


@pytest.mark.parametrize("columns", [80, 0], ids=["a terminal", "one that does not tell its size"])
@pytest.mark.usefixtures("slow")
def test_estimate__shows_size_bar_and_time_on_a_terminal(tmp_path: Path, columns: int) -> None:
    arguments = ("estimate", "slow_first_contact:make", "--structure", "kfac", "--out", "f")
    shown = on_a_terminal(tmp_path, columns, *arguments)
    assert "slow_first_contact:make: 8 parameters in 4 batches. Estimating truncated:2, kfac ..." in shown
    states = re.findall(r"kfac:\s+(\d+)%\|.*?\| (\d)/4 it \[(\d\d:\d\d)<([^\]]+)\]", shown)
    assert states[0] == ("0", "0", "00:00", "?")
    assert any(0 < int(percent) < 100 and left != "?" for percent, _, _, left in states)
    assert shown.index("Estimating") < shown.index("kfac:   0%") < shown.index("Wrote f.")


def test_merge__shows_size_and_bar_on_a_terminal(tasks: Path, tmp_path: Path) -> None:
    arguments: list[str | Path] = ["merge", "--out", "m"]
    for name in "ab":
        arguments += ["--model", tasks / name, "--fisher", tasks / f"{name}.fisher"]
    shown = on_a_terminal(tmp_path, 80, *arguments)
    assert re.search(r"Merging 2 models \([\d.]+ kB\) by their Fishers \([\d.]+ kB\) \.\.\.", shown)
    assert re.search(r"reading Fishers:\s+0%\|.*\| 0/28 blocks \[00:00<\?\]", shown)
    assert re.search(r"merge, 317 numbers:\s+0%\|.*\| \[00:00<\?\]", shown)


@pytest.mark.usefixtures("slow")
def test_estimate__off_a_terminal_says_how_far_it_is_when_it_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("estimate", "slow_first_contact:make", "--structure", "kfac", "--out")
    assert run(*arguments, "f").stderr == ""
    monkeypatch.setattr("fisherkit.cli.command.LINES_EVERY", 0.2)
    lines = run(*arguments, "g").stderr.splitlines()
    assert lines
    assert all(re.fullmatch(r"kfac:\s+\d+%\|.*\| \d/4 it \[\d\d:\d\d<[\d:?]+\]", line) for line in lines), lines


# -- what is not installed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "hidden", "extra"),
    [
        ("fisherkit.continual.lightning", ("lightning", "lightning.pytorch", "pytorch_lightning"), "lightning"),
        ("fisherkit.continual.avalanche", ("avalanche", "avalanche.training"), "avalanche"),
    ],
)
def test_module__without_its_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, module: str, hidden: tuple[str, ...], extra: str
) -> None:
    for name in hidden:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(fk.MissingPackageError, match=rf'Try: pip install "fisherkit\[{extra}\]"') as found:
        importlib.import_module(module)
    assert isinstance(found.value, ImportError)


@pytest.mark.parametrize(
    ("arguments", "module", "extra"),
    [
        (("estimate", "{folder}", "--out", "f"), "transformers", "hf"),
        (("scores", "{folder}"), "transformers", "hf"),
        (("quality", "m:f", "--out", "q"), "matplotlib", "demo"),
        (("show", "f", "--out", "q"), "matplotlib", "demo"),
    ],
    ids=lambda value: str(value),
)
def test_command__without_its_extra_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], module: str, extra: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    monkeypatch.setitem(sys.modules, module, None)
    result = run(*(argument.format(folder="folder") for argument in arguments))
    assert result.exit_code == 1
    assert f'pip install "fisherkit[{extra}]"' in result.stderr


def test_picture__without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = (torch.randn(6, 3), torch.randint(2, (6,)))
    found = fk.evaluation.compare(nn.Linear(3, 2), data, kinds=["sgd", "ef", "exact"], gram_dampings=[1e-3])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(fk.MissingPackageError, match=r"fisherkit\[demo\]"):
        fk.evaluation.plot_damping(found, tmp_path / "p.png")
