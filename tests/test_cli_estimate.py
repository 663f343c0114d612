"""``fisherkit estimate`` on Hugging Face folders and on functions of one's own; the truth is autograd, text by text."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

import fisherkit as fk
from tests import by_hand, commands
from tests.commands import own_module
from tests.text_models import LABELS, SIZES, TEXTS, WORDS, jsonl, make_classifier, make_tokenizer, saved

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # vmap over fused attention


run = partial(commands.run, "estimate")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "texts.jsonl", [{"text": t, "label": n} for t, n in zip(TEXTS, LABELS, strict=True)])


def batch(tokenizer: Any, texts: list[str], labels: Tensor) -> dict[str, Tensor]:
    return dict(tokenizer(texts, padding=True, return_tensors="pt")) | {"labels": labels}


def test_estimate__a_classifiers_fisher_is_that_of_its_own_loss(
    classifier: Path, tokenizer: Any, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "f.safetensors"
    for more in (("--normalization", "sum", "--out", tmp_path / "sum"), ("--out", out)):
        options = "--data", data, "--kind", "ief", "--structure", "diagonal", "--dtype", "float64"
        result = run(classifier, *options, *more)
        assert result.exit_code == 0, result.output
    assert "examples N       5" in result.stdout
    found = fk.load(out)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(classifier, dtype=torch.float64).eval()
    rows = []
    for text, label in zip(TEXTS, LABELS, strict=True):
        one = batch(tokenizer, [text], torch.tensor([model.config.label2id[label]]))
        outputs = model(**one)
        (u,) = torch.autograd.grad(outputs.loss, outputs.logits, retain_graph=True)
        rows.append(by_hand.gradient(outputs.loss, model) / u.norm())
    torch.testing.assert_close(found.diagonal(), torch.stack(rows).square().mean(0), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(fk.load(tmp_path / "sum").diagonal(), 5 * found.diagonal())
    assert found.metadata["kind"] == "ief"
    assert found.metadata["likelihood"] == "categorical"


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_estimate__tables_and_other_columns_give_the_same(
    classifier: Path, data: Path, tmp_path: Path, suffix: str
) -> None:
    separator = "," if suffix == ".csv" else "\t"
    table = tmp_path / f"texts{suffix}"
    lines = [separator.join(("area", "summary"))]
    lines += [separator.join((label, text)) for text, label in zip(TEXTS, LABELS, strict=True)]
    table.write_text("\n".join(lines), encoding="utf-8")
    options = ("--kind", "exact", "--structure", "kfac", "--params", "classifier.*", "--batch-size", "2")
    for source, columns, name in (
        (data, (), "a"),
        (table, ("--text-column", "summary", "--label-column", "area"), "b"),
    ):
        result = run(classifier, "--data", source, *options, *columns, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
    a, b = fk.load(tmp_path / "a"), fk.load(tmp_path / "b")
    assert a.space.names == ("classifier.weight", "classifier.bias")
    assert torch.equal(a.diagonal(), b.diagonal())


def test_estimate__a_causal_model_needs_no_labels(tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0)
    folder = saved(transformers.LlamaForCausalLM(config).double(), tokenizer, tmp_path / "causal")
    source = jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    result = run(
        folder, "--data", source, "--kind", "ef", "--structure", "diagonal", "--batch-size", "2", "--json", "--out",
        tmp_path / "f",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["examples"] == 5
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    squares = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        # Not the model's own loss, which is in float32 whatever the model is in.
        loss = F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum")
        squares.append(by_hand.gradient(loss, model).square())
    expected = torch.stack(squares).mean(0)
    torch.testing.assert_close(fk.load(tmp_path / "f").diagonal(), expected, rtol=1e-8, atol=1e-12)
    assert told["trace"] == pytest.approx(float(expected.sum()))


@pytest.mark.parametrize(
    ("problem", "outputs", "labels", "likelihood"),
    [
        ("regression", 1, [0.5, -1, "2", 3, 0], "gaussian"),
        ("multi_label_classification", 2, [[0, 1], [1, 1], "[0, 0]", [1, 0], [0, 1]], "bernoulli"),
    ],
)
def test_estimate__the_likelihood_is_that_of_the_models_problem(
    tokenizer: Any, tmp_path: Path, problem: str, outputs: int, labels: list[Any], likelihood: str
) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, num_labels=outputs, problem_type=problem)
    folder = saved(transformers.BertForSequenceClassification(config), tokenizer, tmp_path / problem)
    source = jsonl(tmp_path / "texts.jsonl", [{"text": t, "label": n} for t, n in zip(TEXTS, labels, strict=True)])
    result = run(
        folder, "--data", source, "--kind", "exact", "--structure", "diagonal", "--out", tmp_path / "f", "--params",
        "classifier.bias",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    fisher = fk.load(tmp_path / "f")
    assert fisher.metadata["likelihood"] == likelihood
    if likelihood == "gaussian":
        torch.testing.assert_close(fisher.diagonal(), torch.ones(outputs))
    huge = jsonl(tmp_path / "huge.jsonl", [{"text": "a", "label": [10**400] * outputs}])
    assert f"{outputs} number(s), as the model's {likelihood}" in run(folder, "--data", huge, "--out", "g").stderr


FUNCTION = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(24, 4).double(), torch.randint(3, (24,))
    return model, [(x[:12], y[:12]), (x[12:], y[12:])]
"""


@pytest.fixture
def function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    own_module(tmp_path, monkeypatch, "own_module", FUNCTION)
    return "own_module:make"


def test_estimate__says_what_was_written_where_it_is_in_parts(function: str, tmp_path: Path) -> None:
    result = run(function, "--out", tmp_path / "f", "--structure", "kfac", "--max-shard-size", "100")
    written = len(list(tmp_path.glob("f-*.safetensors")))
    assert written > 1
    assert f"Wrote {tmp_path / 'f'} in {written} files beside their index" in " ".join(result.stdout.split())
    assert fk.load(tmp_path / "f").size > 0


def test_estimate__a_functions_model_and_data(function: str, tmp_path: Path) -> None:
    for there in ("f", "f.safetensors.index.json"):
        (tmp_path / there).write_text("mine")
        refused = run(function, "--out", tmp_path / "f")
        assert refused.exit_code == 1
        assert f"{tmp_path / there} to write, which is there" in refused.stderr
        assert (tmp_path / there).read_text() == "mine"
        (tmp_path / there).unlink()
    (tmp_path / "f").write_text("mine")
    result = run(function, "--kind", "truncated:1", "--out", tmp_path / "f", "--structure", "full", "--overwrite")
    assert result.exit_code == 0, result.output
    assert "Wrote" in result.stdout
    model, batches = __import__("own_module").make()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    torch.testing.assert_close(fk.load(tmp_path / "f").to_dense(), fk.TruncatedFisher(model, (x, y), rank=1).to_dense())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere", "--out", "f"), ("no such folder", "package.module:function")),
        (("{classifier}", "--out", "f"), ("--data FILE",)),
        (("{classifier}", "--data", "missing.jsonl", "--out", "f"), ("no file at missing.jsonl",)),
        (("{classifier}", "--data", "{data}", "--out", "no/f"), ("a folder that does not exist",)),
        (("{classifier}", "--data", "{data}", "--params", "head.*", "--out", "f"), ("matches no parameter",)),
        (("{classifier}", "--data", "{data}", "--text-column", "body", "--out", "f"), ("'body'", "--text-column")),
        (("{classifier}", "--data", "bad.jsonl", "--out", "f"), ("line 2 of bad.jsonl", "not JSON")),
        (("{classifier}", "--data", "empty.csv", "--out", "f"), ("has no line",)),
        (("{classifier}", "--data", "other.jsonl", "--out", "f"), ("label 'poetry' in line 1", "linalg")),
        (("{classifier}", "--data", "notes.txt", "--out", "f"), (".jsonl, .csv or .tsv",)),
        (("own_module:make", "--data", "{data}", "--out", "f"), ("--data with a function", "its own data")),
        (("own_module:make", "--examples", "2", "--dtype", "float64", "--out", "f"),
            ("--examples and --dtype with a function", "its own data")),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("function")
def test_estimate__refuses_with_what_to_do_and_leaves_no_file(
    classifier: Path, data: Path, tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a", "label": 0}\n{"text": \n')
    (tmp_path / "empty.csv").write_text("text,label\n")
    (tmp_path / "notes.txt").write_text("a")
    jsonl(tmp_path / "other.jsonl", [{"text": "a", "label": "poetry"}])
    result = run(*(argument.format(classifier=classifier, data=data) for argument in arguments))
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ")
    for word in words:
        assert word in result.stderr
    assert not (tmp_path / "f").exists()


def test_estimate__an_adapter_alone_or_a_folder_without_a_tokenizer_is_refused(
    classifier: Path, data: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert "merge_and_unload" in run(adapter, "--data", data, "--out", tmp_path / "f").stderr
    bare = tmp_path / "bare"
    transformers.AutoModelForSequenceClassification.from_pretrained(classifier).save_pretrained(bare)
    assert "tokenizer.save_pretrained" in run(bare, "--data", data, "--out", tmp_path / "f").stderr


@pytest.mark.parametrize("texts", [("", "graph"), ("",)], ids=str)
def test_estimate__texts_without_a_token_are_refused(texts: tuple[str, ...], tmp_path: Path) -> None:
    """Of tokenizers that put nothing around a text."""
    words = {word: place for place, word in enumerate(WORDS)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]")
    folder = saved(make_classifier(), tokenizer, tmp_path / "model")
    source = jsonl(tmp_path / "texts.jsonl", [{"text": text, "label": 0} for text in texts])
    result = run(folder, "--data", source, "--out", tmp_path / "f")
    assert result.exit_code == 1
    assert "a text without a token in line 1 of texts.jsonl" in result.stderr


def test_estimate__draws_some_of_the_texts_and_counts_those_that_are_cut(
    classifier: Path, data: Path, tmp_path: Path
) -> None:
    result = run(
        classifier, "--data", data, "--out", tmp_path / "f", "--examples", "3", "--max-length", "4", "--json",
        "--structure", "diagonal",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["examples"], told["max_length"]) == (3, 4)
    assert told["texts_at_max_length"] >= 1


def test_estimate__cuts_texts_to_the_positions_behind_a_padding_row(tmp_path: Path) -> None:
    """RoBERTa's first position has the number behind the padding token's; its tokenizer may say no length."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(**SIZES, pad_token_id=1, num_labels=3)
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.model_max_length = int(1e30)
    folder = saved(transformers.RobertaForSequenceClassification(config), tokenizer, tmp_path / "model")
    source = jsonl(tmp_path / "texts.jsonl", [{"text": "a graph of " * 9, "label": n % 3} for n in range(3)])
    result = run(folder, "--data", source, "--out", tmp_path / "f", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["max_length"] == SIZES["max_position_embeddings"] - 2


def test_plan__is_told_by_one_of_torchrun_s_processes(
    classifier: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        result = run(classifier, "--data", data, "--plan")
        assert result.exit_code == 0, result.output
        told.append(result.stdout)
    assert told[0]
    assert not told[1]
