"""``fisherkit scores``: the same numbers as `InfluenceScores`, a page that is whole and safe, and what is refused."""

from __future__ import annotations

import json
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

import fisherkit as fk
from fisherkit.cli.scores_report import data_uri
from tests import commands
from tests.commands import own_module
from tests.text_models import LABELS, SIZES, TEXTS, jsonl, saved

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # vmap over fused attention

MODULE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def parts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.rand(24, 1, 3, 4).double(), torch.randint(3, (24,))
    q, t = torch.rand(6, 1, 3, 4).double(), torch.randint(3, (6,))
    return model, [(x[:10], y[:10]), (x[10:], y[10:])], [(q[:4], t[:4]), (q[4:], t[4:])]

def show(split, index):
    return torch.eye(3), f"\\x1b[2J<script>alert('{split} {index}')</script> & more"

def make():
    return *parts(), show

def regression():
    model, train, queries = parts()
    return model, *([(x.flatten(1), torch.stack([y, y + 1, -y], 1).double()) for x, y in d] for d in (train, queries))

def switches():
    model, train, queries = parts()
    return model, *([(x.flatten(1), torch.stack([y > 0, y > 1, y < 1], 1).double()) for x, y in d]
                    for d in (train, queries))

def shuffled():
    model, train, queries = parts()
    return model, DataLoader(TensorDataset(*train[0]), batch_size=4, shuffle=True), queries

def training():
    model, train, queries = parts()
    return nn.Sequential(model, nn.BatchNorm1d(3).double()), train, queries

def odd_show():
    return *parts(), lambda split, index: 3

def odd_picture():
    return *parts(), lambda split, index: torch.zeros(2, 3, 4, 5)

def pair():
    return parts()[:2]

def no_targets():
    model, train, queries = parts()
    return model, train, [(x, None) for x, _ in queries]

def no_examples():
    model, _, queries = parts()
    return model, [], queries

def half_a_pair():
    return *parts(), lambda split, index: "half \\ud83d"
"""


run = partial(commands.run, "scores")


def found(*arguments: str | Path) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a module of the user's."""
    own_module(tmp_path, monkeypatch, "scored_module", MODULE)
    return tmp_path


def parts() -> Any:
    return __import__("scored_module").parts()


class Page(HTMLParser):
    """Reads a page and insists that every element is closed in its turn."""

    void = ("meta", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def assert_same(told: list[dict[str, Any]], values: Tensor, index: Tensor, sign: int) -> None:
    """The JSON's list is the scores' top, as far as it has the sign."""
    keep = values * sign > 0
    assert [e["index"] for e in told] == index[keep].tolist()
    assert [e["score"] for e in told] == pytest.approx(values[keep].tolist(), rel=1e-9)


@pytest.mark.parametrize("measurement", ["loss", "margin"])
@pytest.mark.parametrize(
    ("options", "damping"),
    [(("--kind", "exact", "--structure", "full"), 1.0), (("--damping", "0.3"), 0.3), ((), 0.1)],
    ids=["full", "ekfac", "ekfac_default"],
)
@pytest.mark.usefixtures("folder")
def test_scores__are_those_of_influence_scores(measurement: str, options: tuple[str, ...], damping: float) -> None:
    told = found("scored_module:make", *options, "--measurement", measurement, "--top", "4", "--self", "3")
    model, train, queries = parts()
    full = "full" in options
    fisher = fk.ExactFisher(model, train) if full else fk.TruncatedFisher(model, train, rank=2, structure="ekfac")
    influence = fk.influence.InfluenceScores(fisher, model, damping=fk.RelativeDamping(damping))
    top = influence.top(queries, train, 4, measurement=measurement)
    assert [query["index"] for query in told["queries"]] == list(range(6))
    for i, query in enumerate(told["queries"]):
        assert_same(query["helpful"], top.helpful[i], top.helpful_index[i], 1)
        assert_same(query["harmful"], top.harmful[i], top.harmful_index[i], -1)
    own = influence.self_influence(train).sort(descending=True)
    assert_same(told["self_influence"], own.values[:3], own.indices[:3], 1)
    assert told["computed"]["damping"] == pytest.approx(influence.damping)
    assert told["computed"]["relative_damping"] == damping
    assert (told["computed"]["examples"], told["computed"]["train"], told["computed"]["queries"]) == (24, 24, 6)


@pytest.mark.parametrize("rows", [(), ("--rows", "rows")])
@pytest.mark.parametrize(("given", "compress"), [("3", 3), ("0.9", 0.9), ("1.0", 1.0), ("1", 1)])
def test_scores__of_compressed_rows_say_how_far_off_they_are(
    folder: Path, rows: tuple[str, ...], given: str, compress: float
) -> None:
    words = "scored_module:make", "--kind", "exact", "--compress", given, "--top", "4", *rows
    told = found(*words, "--most-error", "3")
    model, train, queries = parts()
    influence = fk.influence.InfluenceScores(fk.ExactFisher(model, train, structure="ekfac"), model)
    kept = influence.prepare(train, compress=compress, queries=queries)
    top = influence.top(queries, kept, 4)
    for i, query in enumerate(told["queries"]):
        assert_same(query["helpful"], top.helpful[i], top.helpful_index[i], 1)
    assert kept.compression is not None
    assert told["computed"]["compression"] == {**vars(kept.compression), "whole": [*kept.compression.whole]}
    assert f"scores off by {kept.compression.error:.2g}" in " ".join(run(*words).stdout.split())
    refused = run(*words, "--most-error", "1e-9")
    assert (refused.exit_code, "expected at most --most-error 1e-09" in refused.stderr) == (
        (1, True) if kept.compression.error > 1e-9 else (0, False)
    )


@pytest.mark.usefixtures("folder")
def test_scores__of_rows_in_a_folder_are_those_without() -> None:
    plain, kept, again = (found("scored_module:make", *rows) for rows in ((), ("--rows", "rows"), ("--rows", "rows")))
    for some in (kept, again):
        assert some["queries"] == plain["queries"]


@pytest.mark.parametrize("text", ["2.5", "0", "0.0", "-1", "1,2", "nan", "half"])
def test_scores__refuses_what_is_neither_a_share_nor_a_count(text: str) -> None:
    refused = run("scored_module:make", "--compress", text)
    assert refused.exit_code == 2
    assert f"'{text}' is neither a share above 0 and up to 1.0 nor a count from 1 on" in refused.stderr


@pytest.mark.usefixtures("folder")
def test_scores__worst_keeps_the_queries_with_the_largest_loss() -> None:
    whole, some = found("scored_module:make"), found("scored_module:make", "--worst", "3")
    ranked = sorted(whole["queries"], key=lambda query: -query["loss"])
    assert [query["index"] for query in some["queries"]] == [query["index"] for query in ranked[:3]]
    for a, b in zip(some["queries"], ranked, strict=False):
        for side in ("helpful", "harmful"):
            assert [e["index"] for e in a[side]] == [e["index"] for e in b[side]]
            assert [e["score"] for e in a[side]] == pytest.approx([e["score"] for e in b[side]], rel=1e-8)
    assert any("largest loss" in note for note in some["notes"])


@pytest.mark.usefixtures("folder")
def test_scores__labels_predictions_and_losses_are_the_models() -> None:
    told = found("scored_module:make")
    model, _, queries = parts()
    x, y = (torch.cat(column) for column in zip(*queries, strict=True))
    p = model(x).softmax(-1).detach()
    for i, query in enumerate(told["queries"]):
        assert (query["label"], query["prediction"]) == (str(int(y[i])), str(int(p[i].argmax())))
        assert query["probability"] == pytest.approx(float(p[i].max()))
        assert query["loss"] == pytest.approx(float(-p[i, y[i]].log()))


@pytest.mark.parametrize(("name", "likelihood"), [("regression", "gaussian"), ("switches", "bernoulli")])
@pytest.mark.usefixtures("folder")
def test_scores__of_other_likelihoods(name: str, likelihood: str) -> None:
    told = found(f"scored_module:{name}", "--likelihood", likelihood)
    module = __import__("scored_module")
    model, _, queries = getattr(module, name)()
    z, y = model(queries[0][0]), queries[0][1]
    losses = (
        0.5 * (z - y).square()
        if likelihood == "gaussian"
        else F.binary_cross_entropy_with_logits(z, y, reduction="none")
    )
    assert [query["loss"] for query in told["queries"][:4]] == pytest.approx(losses.sum(1).tolist())
    label = told["queries"][0]["label"].split(", ")
    on = [str(c) for c in range(3) if y[0, c] > 0.5]
    assert label == (on or ["none"]) if likelihood == "bernoulli" else [float(v) for v in label] == y[0].tolist()


@pytest.mark.usefixtures("folder")
def test_scores__a_fisher_file_is_used_again(folder: Path) -> None:
    first = found("scored_module:make", "--save-fisher", "f.safetensors", "--kind", "ief:0.5", "--structure", "kfac")
    assert "--overwrite" in run("scored_module:make", "--save-fisher", "f.safetensors").stderr
    again = found("scored_module:make", "--fisher", "f.safetensors")
    assert (again["computed"]["kind"], again["computed"]["structure"]) == ("ief:0.5", "kfac")
    assert again["computed"]["fisher_file"] == "f.safetensors"
    for a, b in zip(first["queries"], again["queries"], strict=True):
        assert [e["index"] for e in a["helpful"]] == [e["index"] for e in b["helpful"]]
        assert [e["score"] for e in a["helpful"]] == pytest.approx([e["score"] for e in b["helpful"]], rel=1e-9)
    assert any("iEF" in note for note in again["notes"])


@pytest.mark.usefixtures("folder")
def test_scores__the_page_is_whole_and_shows_texts_as_text(folder: Path) -> None:
    result = run("scored_module:make", "--out", "found", "--self", "2", "--top", "3")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (folder / "found").iterdir()) == ["scores.html", "scores.json"]
    text = (folder / "found/scores.html").read_text(encoding="utf-8")
    told = json.loads((folder / "found/scores.json").read_text(encoding="utf-8"))
    page = Page(text)
    names = [tag for tag, _ in page.tags]
    assert "script" not in names
    assert "\x1b" not in result.stdout
    assert "�[2J" in result.stdout
    assert "<script>alert('queries 0')</script> & more" in page.text
    assert names.count("section") == len(told["queries"]) + 1
    listed = sum(len(query[side]) for query in told["queries"] for side in ("helpful", "harmful"))
    assert names.count("li") == listed + len(told["self_influence"])
    for query in told["queries"]:
        for scored in (*query["helpful"], *query["harmful"]):
            assert f"{scored['score']:+.3g}" in page.text
    # Nothing outside the page: links lead into it, and pictures are in it.
    links = [attrs[key] for _, attrs in page.tags for key in ("src", "href") if key in attrs]
    assert links
    assert all(link is not None and link.startswith(("#query-", "data:image/png;base64,")) for link in links)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(set(ids)) == len(ids)
    assert {link[1:] for link in links if link and link.startswith("#")} <= set(ids)
    assert "url(" not in text


@pytest.mark.usefixtures("folder")
def test_scores__images_are_shown_without_being_asked(folder: Path) -> None:
    assert run("scored_module:parts", "--out", "found").exit_code == 0
    page = Page((folder / "found/scores.html").read_text(encoding="utf-8"))
    pictures = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    _, _, queries = parts()
    assert data_uri(queries[0][0][0], "test") in pictures


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "train.jsonl", [{"text": t, "label": n} for t, n in zip(TEXTS, LABELS, strict=True)])


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "queries.jsonl", [{"text": t, "label": "fft"} for t in TEXTS[1:3]])


def test_scores__of_a_folder_with_texts(
    classifier: Path, train: Path, queries: Path, tokenizer: Any, tmp_path: Path
) -> None:
    result = run(
        classifier, "--train", train, "--queries", queries, "--params", "classifier.*", "--dtype", "float64",
        "--out", tmp_path / "found", "--top", "9", "--batch-size", "2",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "found/scores.json").read_text(encoding="utf-8"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(classifier, dtype=torch.float64).eval()

    def batch(texts: list[str], labels: list[str]) -> dict[str, Tensor]:
        ids = torch.tensor([model.config.label2id[label] for label in labels])
        return dict(tokenizer(texts, padding=True, return_tensors="pt")) | {"labels": ids}

    data, asked = batch(TEXTS, LABELS), batch(TEXTS[1:3], ["fft", "fft"])
    fisher = fk.TruncatedFisher(model, data, rank=2, structure="ekfac", params=["classifier.weight", "classifier.bias"])
    scores = fk.influence.InfluenceScores(fisher, model).scores(asked, data)
    for i, query in enumerate(told["queries"]):
        assert (query["text"], query["label"], query["place"]) == (
            TEXTS[i + 1],
            "fft",
            f"line {i + 1} of queries.jsonl",
        )
        both = query["helpful"] + query["harmful"]
        assert sorted(e["index"] for e in both) == list(range(5))
        for e in both:
            assert e["score"] == pytest.approx(float(scores[i, e["index"]]), rel=1e-6)
            assert (e["text"], e["label"]) == (TEXTS[e["index"]], LABELS[e["index"]])
    assert "line 1 of queries.jsonl: label fft" in result.stdout


def test_scores__of_a_causal_model_need_no_labels(tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0)
    folder = saved(transformers.LlamaForCausalLM(config).double(), tokenizer, tmp_path / "causal")
    texts = jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    told = found(folder, "--train", texts, "--queries", texts, "--structure", "diagonal", "--kind", "ef")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    for text, query in zip(TEXTS, told["queries"], strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        loss = F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum")
        assert query["loss"] == pytest.approx(loss.item())
        assert (query["label"], query["prediction"], query["text"]) == (None, None, text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere",), ("no such folder", "package.module:function")),
        (("{classifier}", "--queries", "{data}"), ("expected --train FILE",)),
        (("{classifier}", "--train", "{data}", "--queries", "missing.jsonl"), ("--queries: got no file",)),
        (("scored_module:make", "--train", "{data}"), ("--train with a function", "its own data")),
        (("scored_module:pair",), ("a tuple of 2", "(model, train, queries, show)")),
        (("scored_module:shuffled",), ("shuffles as train", "Try: DataLoader(data, shuffle=False), or")),
        (("scored_module:training", "--fisher", "f", "--worst", "2"),
            ("BatchNorm1d '1' in train mode", "model.eval()")),
        (("scored_module:odd_show",), ("show('train',", "a text, a picture as an array")),
        (("scored_module:odd_picture",), ("a picture of shape [2, 3, 4, 5]",)),
        (("scored_module:no_targets",), ("targets",)),
        (("scored_module:no_examples",), ("no batch",)),
        (("scored_module:no_examples", "--fisher", "f"), ("no batch",)),
        (("scored_module:make", "--worst", "2", "--max-length", "3"), ("--max-length with a function",)),
        (("scored_module:make", "--rows", "no/rows"), ("scores --rows: got a folder that does not exist: ", "no")),
        (("scored_module:make", "--most-error", "0.1"), ("--most-error without --compress",)),
        # Before the model is made: there is none.
        (("missing:make", "--structure", "full", "--compress", "0.5"),
            ("--compress with --structure full", "without Kronecker factors", "--structure kfac, ekfac or nkp, or")),
        (("missing:make", "--structure", "diagonal", "--compress", "3"), ("--compress with --structure diagonal",)),
        (("missing:make", "--fisher", "d", "--compress", "3"), ("--compress with --fisher d, of structure diagonal",
            "Try: a Fisher file of structure kfac, ekfac or nkp, or whole rows")),
        (("scored_module:make", "--absolute-damping"), ("without --damping",)),
        (("scored_module:make", "--params", "head.*"), ("matches no parameter",)),
        (("scored_module:make", "--fisher", "f", "--kind", "ef"), ("--kind beside --fisher",)),
        (("scored_module:make", "--fisher", "missing.safetensors"), ("missing.safetensors",)),
        (("scored_module:make", "--save-fisher", "no/f"), ("a folder that does not exist",)),
        (("scored_module:regression", "--likelihood", "gaussian", "--measurement", "margin"), ("margin",)),
    ],
)  # fmt: skip
def test_scores__refuses_with_what_to_do_and_leaves_no_file(
    folder: Path, classifier: Path, train: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    model, data, _ = parts()
    fk.EmpiricalFisher(model, data, structure="kfac").save(folder / "f")
    fk.EmpiricalFisher(model, data, structure="diagonal").save(folder / "d")
    result = run(*(text.format(classifier=classifier, data=train) for text in arguments), "--out", "new/found")
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ")
    for word in words:
        assert word in result.stderr
    assert "shard=" not in result.stderr
    assert not (folder / "new").exists()


def test_scores__a_fisher_of_other_weights_is_refused(folder: Path) -> None:
    model, data, _ = parts()
    with torch.no_grad():
        model[1].weight.add_(1e-3)
    fk.EmpiricalFisher(model, data, structure="kfac").save(folder / "f")
    assert "not those that the Fisher was measured at" in run("scored_module:make", "--fisher", "f").stderr


def test_scores__a_fisher_of_another_dtype_names_it(folder: Path) -> None:
    model, data, _ = parts()
    fk.EmpiricalFisher(model.float(), [(x.float(), y) for x, y in data], structure="kfac").save(folder / "f")
    said = " ".join(run("scored_module:make", "--fisher", "f").stderr.split())
    assert said.startswith("error: fisherkit scores: got a Fisher of torch.float32")
    assert "Try: the model in torch.float32" in said


def test_scores__a_page_that_cannot_be_written_leaves_the_old_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "found").mkdir()
    (folder / "found/scores.html").write_text("old")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", fail)
    refused = run("scored_module:make", "--out", "found")
    assert (refused.exit_code, "found/scores.html to write, which is there" in refused.stderr) == (1, True)
    result = run("scored_module:make", "--out", "found", "--overwrite")
    assert result.exit_code == 1
    assert "no space left" in result.stderr
    assert [(p.name, p.read_text()) for p in (folder / "found").iterdir()] == [("scores.html", "old")]


def test_scores__are_in_their_files_where_nobody_reads_what_is_printed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **options: Any) -> None:
        if not options.get("err"):
            raise BrokenPipeError

    monkeypatch.setattr("typer.echo", broken)
    assert run("scored_module:make", "--out", "found").exit_code == 1
    assert {path.name for path in (folder / "found").iterdir()} == {"scores.html", "scores.json"}


def test_scores__of_texts_that_hold_half_a_surrogate_pair_are_written(folder: Path) -> None:
    assert found("scored_module:half_a_pair", "--out", "found")["queries"][0]["text"] == "half ?"
    assert "half ?" in (folder / "found/scores.html").read_text("utf-8")
