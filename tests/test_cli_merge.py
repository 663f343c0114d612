"""``fisherkit merge``: the truth is `fisherkit.merging`, and that ``from_pretrained`` loads what was written."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

import fisherkit as fk
from fisherkit import io
from fisherkit.cli.text import apart
from fisherkit.merging.blocks import _operations, expected_seconds
from tests import commands
from tests.text_models import LABELS, TEXTS, jsonl, make_classifier, make_tokenizer, saved

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # vmap over fused attention


merged = partial(commands.run, "merge")


def both(tasks: Path, *, fishers: bool = True) -> list[str | Path]:
    found: list[str | Path] = []
    for name in "ab":
        found += ["--model", tasks / name] + (["--fisher", tasks / f"{name}.fisher"] if fishers else [])
    return found


def test_merge__writes_a_folder_that_loads_and_predicts(tasks: Path, tokenizer: Any, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    result = merged(*both(tasks), "--out", out, "--damping", "0.1", "--normalize", "block")
    assert result.exit_code == 0, result.output
    assert f"Wrote {out}" in result.stdout
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    expected = fk.merging.merge(
        [tasks / "a", tasks / "b"], [tasks / "a.fisher", tasks / "b.fisher"], damping=fk.RelativeDamping(0.1),
        normalize="block",
    )  # fmt: skip
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    inputs = transformers.AutoTokenizer.from_pretrained(out)(TEXTS, padding=True, return_tensors="pt")
    assert model(**inputs).logits.shape == (len(TEXTS), 3)
    info = json.loads((out / "merge.json").read_text())
    assert info["weights"] == [0.5, 0.5]
    assert all(block["converged"] for block in info["blocks"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


def test_merge__the_comparisons(tasks: Path, tokenizer: Any, tmp_path: Path) -> None:
    a, b = (load_file(tasks / name / "model.safetensors") for name in "ab")
    start = saved(make_classifier(7), tokenizer, tmp_path / "start")
    base = load_file(start / "model.safetensors")
    models = both(tasks, fishers=False)
    for arguments, expected in (
        (("--method", "average", "--weights", "1,3"), {n: (a[n].double() + 3 * b[n].double()) / 4 for n in a}),
        (
            ("--method", "task-arithmetic", "--base", start, "--scale", "0.7"),
            {n: base[n].double() + 0.7 * (a[n].double() + b[n].double() - 2 * base[n].double()) for n in a},
        ),
    ):
        result = merged(*models, *arguments, "--out", tmp_path / "out", "--overwrite")
        assert result.exit_code == 0, result.output
        found = load_file(tmp_path / "out" / "model.safetensors")
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name].double(), tensor, rtol=1e-6, atol=1e-7)
    result = merged(*both(tasks), "--method", "regmean", "--shrink", "0.5", "--out", tmp_path / "regmean", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["method"] == "regmean"


def layered(tasks: Path) -> list[str | Path]:
    return [part for name in "ab" for part in ("--model", tasks / name, "--data", tasks / "texts.jsonl")]


@pytest.mark.parametrize("check", [False, True])
def test_merge__layer_after_layer_is_the_packages_own(check: bool, tasks: Path, tmp_path: Path) -> None:
    options = (
        "--method",
        "layers",
        "--kind",
        "exact",
        "--structure",
        "diagonal",
        *("--check", tasks / "texts.jsonl") * check,
    )
    result = merged(*layered(tasks), *options, "--out", tmp_path / "merged", "--dtype", "float64")
    assert result.exit_code == 0, result.output
    assert "layers of 2 models" in result.stdout
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    models = [load(tasks / name).eval() for name in "ab"]
    tokens = transformers.AutoTokenizer.from_pretrained(tasks / "a")(TEXTS, padding=True, return_tensors="pt")
    batch = {**tokens, "labels": torch.tensor([models[0].config.label2id[name] for name in LABELS])}
    expected = fk.merging.merge_layers(
        models, [batch, batch], fisher=partial(fk.ExactFisher, structure="diagonal"),
        policy=fk.merging.MergePolicy(dtype=torch.float64),
    )  # fmt: skip
    info = json.loads((tmp_path / "merged" / "merge.json").read_text())
    share, average = info["share"] if check else 1.0, fk.merging.average(models)
    assert [name for name in info if name == "losses" and info[name]] == ["losses"] * check
    for name, tensor in load(tmp_path / "merged", dtype=torch.float64).state_dict().items():
        wanted = share * expected[name] + (1 - share) * average[name].double()
        torch.testing.assert_close(
            tensor, wanted, rtol=1e-5, atol=1e-6
        )  # of models in float32, by batches of another size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


@pytest.mark.parametrize(
    ("options", "got"),
    [(("--method", "layers", "--data", "a.jsonl"), "2 models and 1 --data"), (("--method", "layers"), "0 --data"),
     (("--method", "layers", "--data", "no.jsonl", "--data", "no.jsonl"), "no file at no.jsonl"),
     (("--data", "a.jsonl"), "--method auto with --data"), (("--kind", "ef"), "--method auto with --kind"),
     (("--kind", "ef", "--structure", "kfac"), "--kind, --structure: of --method layers alone"),
     (("--method", "average", "--examples", "5"), "--method average with --examples")],
)  # fmt: skip
def test_merge__refuses_texts_that_do_not_belong_to_the_models(
    options: tuple[str, ...], got: str, tasks: Path, tmp_path: Path
) -> None:
    result = merged(*both(tasks, fishers=False), *options, "--out", tmp_path / "m")
    assert result.exit_code == 1
    assert got in result.stderr
    assert not (tmp_path / "m").exists()


def test_merge__files_make_a_file(tasks: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    models = [part for name in "ab" for part in ("--model", tasks / name / "model.safetensors")]
    result = merged(*models, "--method", "average", "--out", out)
    assert result.exit_code == 0, result.output
    assert set(load_file(out)) == set(load_file(tasks / "a" / "model.safetensors"))
    assert "--overwrite" in merged(*models, "--method", "average", "--out", out).stderr


def test_merge__shards_load_too(tasks: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    result = merged(*both(tasks), "--out", out, "--max-shard-size", "600")
    assert result.exit_code == 0, result.output
    assert (out / "model.safetensors.index.json").exists()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    whole = fk.merging.merge([tasks / "a", tasks / "b"], [tasks / "a.fisher", tasks / "b.fisher"])
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize(("own", "wanted"), [("bfloat16", "float32"), ("float32", "float16")])
def test_merge__loads_in_the_dtype_that_was_asked_for(
    tasks: Path, tokenizer: Any, tmp_path: Path, own: str, wanted: str, check: bool
) -> None:
    for seed, name in enumerate("ab"):
        saved(make_classifier(seed).to(getattr(torch, own)), tokenizer, tmp_path / name)
    options = ["--method", "task-arithmetic", "--base", tmp_path / "a", "--scale", "0.3", "--dtype", wanted]
    checked = ["--check", tasks / "texts.jsonl"] if check else []
    result = merged(
        "--model", tmp_path / "a", "--model", tmp_path / "b", *options, *checked, "--out", tmp_path / "merged"
    )
    assert result.exit_code == 0, result.output
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype="auto")
    assert model.dtype == getattr(torch, wanted)
    written = load_file(tmp_path / "merged" / "model.safetensors")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    if not check:
        expected = {n: a[n].double() + 0.3 * (b[n].double() - a[n].double()) for n in a}
        assert all(torch.equal(written[n], tensor.to(model.dtype)) for n, tensor in expected.items())
    assert all(torch.equal(tensor, written[name]) for name, tensor in model.state_dict().items())


def test_merge__models_whose_classes_differ_are_refused(tasks: Path, tokenizer: Any, tmp_path: Path) -> None:
    other = make_classifier(1)
    other.config.id2label = {0: "fft", 1: "linalg", 2: "integrate"}
    saved(other, tokenizer, tmp_path / "other")
    models = ("--model", tasks / "a", "--model", tmp_path / "other", "--method", "average", "--out", tmp_path / "m")
    result = merged(*models)
    assert result.exit_code == 1
    assert "id2label" in result.stderr
    assert not (tmp_path / "m").exists()
    assert merged(*models, "--config-from-first").exit_code == 0
    assert json.loads((tmp_path / "m" / "config.json").read_text())["id2label"]["0"] == "linalg"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--fisher", "{tasks}/a.fisher"), "a Fisher for each model"),
        (("--method", "average", "--fisher", "{tasks}/a.fisher"), "no Fishers"),
        (("--method", "task-arithmetic", "--scale", "1"), "--base and --scale"),
        (("--method", "average", "--damping", "1", "--tolerance", "0.1"), "average with --damping, --tolerance"),
        (("--method", "regmean", "--uncovered", "average"), "regmean with --uncovered"),
        (("--method", "average", "--base", "{tasks}/a"), "--base and --scale"),
        (("--method", "average", "--out", "{full}"), "not empty"),
        (("--method", "average", "--out", "{full}/no/m"), "does not exist"),
        (("--method", "average", "--out", "{full}/m.safetensors"), "folders and --out"),
        (("--fisher", "{tasks}/a.fisher", "--fisher", "{tasks}/none"), "do not exist"),
    ],
)
def test_merge__refuses_with_what_to_do_and_leaves_nothing(
    tasks: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    save_file({"x": torch.ones(1)}, full / "x.safetensors")
    filled = [argument.format(tasks=tasks, full=full) for argument in arguments]
    out = [] if "--out" in filled else ["--out", tmp_path / "m"]
    result = merged(*both(tasks, fishers=False), *filled, *out)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ")
    assert words in result.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "x.safetensors"]


def test_merge__an_interrupted_merge_leaves_what_was_there(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "m"
    assert merged(*both(tasks, fishers=False), "--method", "average", "--out", out).exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def stop(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("fisherkit.merging.export.shutil.copy2", stop)
    result = merged(*both(tasks), "--out", out, "--overwrite")
    assert result.exit_code == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_merge__overwriting_a_folder_that_holds_anything_else_is_refused(tasks: Path, tmp_path: Path) -> None:
    out = tmp_path / "project"
    (out / "chapters").mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    result = merged(*both(tasks, fishers=False), "--method", "average", "--out", out, "--overwrite")
    assert result.exit_code == 1
    assert "['chapters', 'notes.txt']" in result.stderr
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "chapters").is_dir()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def sources(tasks: Path, tmp_path: Path) -> Path:
    """Copies of the tasks' models and Fishers, a's Fisher within a's folder, as a tool of one's own might put it."""
    for name in "ab":
        shutil.copytree(tasks / name, tmp_path / name)
        shutil.copy(tasks / f"{name}.fisher", tmp_path / f"{name}.fisher")
    shutil.copy(tasks / "a.fisher", tmp_path / "a" / "fisher.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ("a/fisher.safetensors", "b.fisher", "--out", "a"),
        ("a.fisher", "b.fisher", "--out", "b/../b"),
        ("a.fisher", "b.fisher", "--out", "link"),
        ("a.fisher", "b.fisher", "--out", "new", "--center", "new"),
        ("new/fisher.safetensors", "b.fisher", "--out", "new"),
        (None, None, "--method", "average", "--out", "b"),
        (None, None, "--method", "task-arithmetic", "--base", "new", "--scale", "1", "--out", "new"),
    ],
    ids=lambda arguments: " ".join(str(part) for part in arguments),
)
def test_merge__overwriting_what_it_reads_is_refused(
    sources: Path, arguments: tuple[str | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sources)
    shutil.copytree("a", "new")
    Path("link").symlink_to("b")
    before = contents(sources)
    first, second, *others = arguments
    given: list[str] = []
    for model, fisher in (("a", first), ("b", second)):
        given += ["--model", model] + (["--fisher", fisher] if fisher else [])
    result = merged(*given, *(part for part in others if part), "--overwrite")
    assert result.exit_code == 1
    assert "which is read" in result.stderr
    assert contents(sources) == before


def test_merge__overwriting_a_fisher_file_is_refused(sources: Path) -> None:
    before = contents(sources)
    given: list[str | Path] = []
    for name in "ab":
        given += ["--model", sources / name / "model.safetensors", "--fisher", sources / f"{name}.fisher"]
    given[3] = (sources / "a.fisher").rename(sources / "f.safetensors")
    before["f.safetensors"] = before.pop("a.fisher")
    result = merged(*given, "--out", sources / "f.safetensors", "--overwrite")
    assert (result.exit_code, "which is read" in result.stderr) == (1, True)
    assert contents(sources) == before


def test_merge__overwriting_a_folder_with_other_tensors_is_refused(sources: Path) -> None:
    """Also where the first model has a file of this name: it is not copied."""
    (sources / "b" / "fisher.safetensors").write_bytes(b"mine")
    (sources / "c").mkdir()
    for name in ("fisher.safetensors", "optimizer.pt"):
        (sources / "c" / name).write_bytes(b"mine")
    result = merged(*both(sources, fishers=False), "--method", "average", "--out", sources / "c", "--overwrite")
    assert (result.exit_code, "['fisher.safetensors', 'optimizer.pt']" in result.stderr) == (1, True)


def test_merge__overwrites_shards(tasks: Path, tmp_path: Path) -> None:
    arguments = (*both(tasks, fishers=False), "--method", "average", "--out", tmp_path / "m")
    assert merged(*arguments, "--max-shard-size", "600").exit_code == 0
    assert merged(*arguments, "--overwrite").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "m").glob("*.safetensors*")) == ["model.safetensors"]


def test_merge__folders_into_a_file_are_refused(tasks: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for name in ("file", "m.safetensors"):
        result = merged(*both(tasks), "--out", tmp_path / name, "--overwrite")
        assert result.exit_code == 1
        assert f"folders and --out {tmp_path / name}, a file; expected the name of a folder" in result.stderr
    assert contents(tmp_path) == {"file": b"mine"}


def test_merge__into_the_current_folder(tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    result = merged(*both(tasks, fishers=False), "--method", "average", "--out", ".")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "here" / "model.safetensors").exists()


def test_merge__says_which_models_could_not_be_compared_with_their_fishers(tasks: Path, tmp_path: Path) -> None:
    folders = []
    for name in "ab":
        model = transformers.AutoModelForSequenceClassification.from_pretrained(tasks / name).half()
        folders.append(saved(model, make_tokenizer(tasks), tmp_path / name))
    result = merged(
        "--model", folders[0], "--fisher", tasks / "a.fisher", "--model", folders[1], "--fisher", tasks / "b.fisher",
        "--out", tmp_path / "m",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "(models 1, 2)" in result.stdout
    assert "(models" not in merged(*both(tasks), "--out", tmp_path / "n").stdout


def test_merge__says_how_long_it_takes_and_which_blocks_the_average_leaves_nearer(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fisherkit.cli.merge.WORTH_SAYING", 0.0)
    monkeypatch.setattr("fisherkit.cli.merge.FARTHER", 0.0)
    said: list[str] = []
    monkeypatch.setattr("fisherkit.cli.merge.say", said.append)  # which is for terminals
    result = merged(*both(tasks), "--out", tmp_path / "m", "--verbose")
    assert re.fullmatch(r"Merging 2 models \(.*\) by their Fishers \(.*\), about .* on one CPU core \.\.\.", *said)
    blocks = json.loads((tmp_path / "m" / "merge.json").read_text())["blocks"]
    some = sum(bool(block["against_average"]) for block in blocks)
    assert f"{some:,} blocks are farther from some model's outputs" in result.stdout
    assert "--check" in result.stdout
    monkeypatch.setattr("fisherkit.cli.merge.FARTHER", 1e9)
    assert "farther" not in merged(*both(tasks), "--out", tmp_path / "n", "--verbose").stdout


def test_merge__checked_on_texts_is_the_best_between_the_average_and_the_merged_model(
    tasks: Path, tmp_path: Path
) -> None:
    files = []
    for place, own in enumerate((slice(0, 3), slice(3, None))):
        pairs = list(zip(TEXTS, LABELS, strict=True))[own]
        lines = [json.dumps({"text": text, "label": label}) for text, label in pairs]
        files.append(tmp_path / f"{place}.jsonl")
        files[-1].write_text("\n".join(lines) + "\n")
    options = ["--damping", "1e-3"]
    checked = merged(*both(tasks), *options, "--check", files[0], "--check", files[1], "--out", tmp_path / "checked")
    assert checked.exit_code == 0, checked.output
    info = json.loads((tmp_path / "checked" / "merge.json").read_text())
    for name, method in (("merged", options), ("average", [])):
        fishers = both(tasks) if method else [*both(tasks, fishers=False), "--method", "average"]
        assert merged(*fishers, *method, "--out", tmp_path / name).exit_code == 0
    start, end = (load_file(tmp_path / name / "model.safetensors") for name in ("average", "merged"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    losses, states = [], []
    for share in (0, 0.25, 0.5, 0.75, 1):
        states.append({n: (start[n].double() + share * (end[n].double() - start[n].double())).float() for n in start})
        model.load_state_dict(states[-1])
        means = []
        for file in files:
            found = [json.loads(line) for line in file.read_text().splitlines()]
            each = [
                torch.nn.functional.cross_entropy(
                    model(**tokenizer(pair["text"], return_tensors="pt")).logits.double(),
                    torch.tensor([model.config.label2id[pair["label"]]]),
                ).item()
                for pair in found
            ]
            means.append(sum(each) / len(each))
        losses.append(sum(means) / 2)
    assert [loss for _, loss in info["losses"]] == pytest.approx(losses, rel=1e-5)
    best = min(range(5), key=losses.__getitem__)
    assert info["share"] == best / 4
    assert f"{best / 4:g} of the way was taken" in checked.stdout
    tried = apart([loss for _, loss in info["losses"]])
    assert f"merged model {', '.join(tried)}: " in checked.stdout
    written = load_file(tmp_path / "checked" / "model.safetensors")
    for name, tensor in states[best].items():
        torch.testing.assert_close(written[name], tensor, rtol=1e-6, atol=1e-7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.jsonl", "1.jsonl", "average", "checked", "merged"]


@pytest.mark.parametrize(
    ("losses", "shown"),
    [
        ([0.5, 0.25, 0.25], ["0.5", "0.25", "0.25"]), ([0.69312, 0.69313, 0.7], ["0.69312", "0.69313", "0.7"]),
        ([1.0, 1.0 + 2**-52], ["1", "1.0000000000000002"]), ([123456.0], ["1.23e+05"]), ([], []),
        ([float("nan"), float("inf"), 1.5], ["nan", "inf", "1.5"]),
    ],
)  # fmt: skip
def test_apart__has_the_digits_that_tell_numbers_apart(losses: list[float], shown: list[str]) -> None:
    assert apart(losses) == shown


@pytest.mark.parametrize("options", [["--method", "average"], ["--mismatched", "skip"]], ids=" ".join)
def test_merge__refuses_a_check_of_what_has_no_loss(options: list[str], tasks: Path, tmp_path: Path) -> None:
    sources = both(tasks, fishers=options[0] != "--method")
    result = merged(*sources, *options, "--check", tasks / "texts.jsonl", "--out", tmp_path / "m")
    assert result.exit_code == 1
    assert f"--check with {' '.join(options)}" in result.stderr
    assert f"Try: leave out {' '.join(options)}, or --check" in result.stderr
    assert not (tmp_path / "m").exists()


def test_merge__refuses_a_check_of_causal_texts_of_one_token(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=12, n_positions=16, n_embd=4, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    plain = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2}, "[UNK]")),
        pad_token="[PAD]",
    )  # fmt: skip
    folders = [saved(model, plain, tmp_path / name) for name in ("a", "b")]
    texts = jsonl(tmp_path / "texts.jsonl", [{"text": "a"}, {"text": "a"}])
    fishers = []
    for folder in folders:
        fishers.append(tmp_path / f"{folder.name}.f")
        fk.EmpiricalFisher(
            model.eval(), (torch.ones(2, 3).long(), torch.ones(2, 3).long()), structure="diagonal"
        ).save(fishers[-1])  # fmt: skip
    pairs = zip(folders, fishers, strict=True)
    sources = [word for folder, fisher in pairs for word in ("--model", folder, "--fisher", fisher)]
    result = merged(*sources, "--check", texts, "--out", tmp_path / "m")
    assert result.exit_code == 1
    assert "texts of one token" in result.stderr
    assert not (tmp_path / "m").exists()


def test_expected_seconds__counts_the_layers_that_are_kronecker_products(tmp_path: Path) -> None:
    found = []
    for width in (100, 400):
        model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Flatten(), torch.nn.Linear(8, width))
        fisher = fk.EmpiricalFisher(
            model, (torch.zeros(2, 2, dtype=torch.long), torch.zeros(2).long()), structure="kfac"
        )
        fisher.save(tmp_path / f"{width}.safetensors")
        found.append(io.read_header(tmp_path / f"{width}.safetensors", "test"))
    small, large = (_operations(header) for header in found)
    assert small == (9 * 100) ** 3 / 3
    assert large == 22.5 * (400**3 + 9**3) + 20 * 2 * 409 * 3600
    assert expected_seconds(found) > 0
    assert expected_seconds([]) == 0
