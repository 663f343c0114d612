"""Rows in the leading eigenvectors of Kronecker factors: the scores they must give, the error that is said, folders."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from fisherkit import io
from fisherkit.influence import InfluenceScores, RowBlocks, blocks
from fisherkit.structures import structures
from tests import ranks
from tests.conformance_cases import build, problem
from tests.influence_cases import data
from tests.small_data import F64, same

X = torch.randn(40, 9, dtype=F64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 4
QUERIES = X[:6] + 0.3, Y[:6]


def model() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 11, bias=False), nn.Tanh(), nn.Linear(11, 4)
        ).double()


def influence(kind: Any = fk.EmpiricalFisher, structure: str = "kfac", **options: Any) -> InfluenceScores:
    net = model()
    return InfluenceScores(kind(net, (X, Y), structure=structure), net, **options)


def layers(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each layer's inputs, with a 1 for a bias, and the loss's gradients at its outputs, example by example."""
    net, found = model(), []
    for i in range(len(x)):
        h, sides = x[i], []
        for layer in net:
            if isinstance(layer, nn.Linear):
                a = h.detach() if layer.bias is None else torch.cat([h.detach(), h.new_ones(1)])
                h = layer(h)
                sides.append((a, h))
            else:
                h = layer(h)
        loss = nn.functional.cross_entropy(h, y[i])
        gradients = torch.autograd.grad(loss, [out for _, out in sides])
        found.append([(a, g) for (a, _), g in zip(sides, gradients, strict=True)])
    return [(torch.stack([one[j][0] for one in found]), torch.stack([one[j][1] for one in found])) for j in range(3)]


def expected(compress: int | float, damping: float) -> list[Tensor]:
    """Each layer's scores by brute force: rows written out, eigenvectors made here, and the formula."""
    found = []
    for (a, g), (b, h) in zip(layers(X, Y), layers(*QUERIES), strict=True):
        (e_a, u_a), (e_g, u_g) = (torch.linalg.eigh(side.mT @ side / len(X)) for side in (a, g))
        pairs = [(max(float(x * y), 0.0), i, j) for i, x in enumerate(e_a) for j, y in enumerate(e_g)]
        if isinstance(compress, int):
            first, second = a.shape[1] - compress, g.shape[1] - compress
            kept = [pair for pair in pairs if pair[1] >= first and pair[2] >= second]
        else:
            # Unless they are fewer numbers than two vectors, all pairs of the eigenvectors that are among the chosen.
            share = [e / (e + damping) for e, _, _ in pairs]
            order, total, kept = sorted(range(len(pairs)), key=lambda k: -share[k]), 0.0, []
            while total < compress * sum(share):
                kept.append(pairs[order[len(kept)]])
                total += share[order[len(kept) - 1]]
            rows, columns = {i for _, i, _ in kept}, {j for _, _, j in kept}
            if len(kept) >= len(rows) + len(columns):
                kept = [pair for pair in pairs if pair[1] in rows and pair[2] in columns]
        score = torch.zeros(len(b), len(a), dtype=F64)
        for e, i, j in kept:
            u, v = u_a[:, i], u_g[:, j]
            score += torch.outer((b @ u) * (h @ v), (a @ u) * (g @ v)) / (e + damping)
        found.append(score / len(X))
    return found


@pytest.mark.parametrize("compress", [1, 3, 0.3, 0.8, 0.97])
def test_compressed_scores__are_those_of_rows_on_the_leading_eigenvectors(compress: int | float) -> None:
    scores = influence()
    rows, by_hand = scores.prepare(cut_data(), compress=compress), expected(compress, scores.damping)
    whole = sum(by_hand)
    assert isinstance(whole, Tensor)
    same(scores.scores(QUERIES, rows), whole)
    parts = scores.scores(QUERIES, rows, by="module")
    for name, part in zip(("0", "2", "4"), by_hand, strict=True):
        same(parts[name], part)
    top = scores.top([(QUERIES[0][:2], QUERIES[1][:2]), (QUERIES[0][2:], QUERIES[1][2:])], rows, 5)
    same(top.helpful, whole.topk(5, 1).values)
    same(top.harmful, -(-whole).topk(5, 1).values)
    same(scores.scores(QUERIES, rows, groups=Y)[:, 1], whole[:, Y == 1].sum(1))
    own = scores.self_influence(rows)
    same(own, scores.scores((X, Y), rows).diagonal())
    same(scores.scores(QUERIES, rows, normalize="relatif"), whole / (len(X) * own).sqrt())


def cut_data() -> list[tuple[Tensor, Tensor]]:
    return [(X[:13], Y[:13]), (X[13:30], Y[13:30]), (X[30:], Y[30:])]


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize(
    "family", ["conv2d", "token_mlp", "linear_3d", "embedding", "hf_conv1d", "mapping_batch", "tied_linears", "rnn"]
)
def test_all_eigenvectors__give_the_scores_of_whole_rows(family: str, structure: str) -> None:
    of = problem(family)
    scores = InfluenceScores(build(family, "exact", structure), of.model)
    found = [scores.prepare(data(of), compress=compress) for compress in (10_000, 1 - 1e-12)]
    for rows in found:
        same(scores.scores(data(of), rows), scores.scores(data(of), data(of)))
        assert rows.compression is not None
        assert rows.compression.error < 1e-9 > abs(rows.compression.captured - 1)


def near(value: Tensor) -> Any:
    return pytest.approx(float(value), rel=1e-5)


@pytest.mark.parametrize("asked", [None, QUERIES])
def test_the_error__is_that_of_the_scores(asked: Any) -> None:
    scores = influence(structure="ekfac")
    rows = scores.prepare((X, Y), compress=0.7, checked=10, queries=asked)
    sample = X[::4], Y[::4]
    of = sample if asked is None else asked
    whole, found = scores.scores(of, sample), scores.scores(of, scores.prepare(sample, compress=0.7))
    if asked is None:
        others = ~torch.eye(10, dtype=torch.bool)
        whole, found = whole[others].view(10, 9), found[others].view(10, 9)
    errors = (found - whole).norm(dim=1) / whole.norm(dim=1)
    places = [s.argsort(1).argsort(1).double() for s in (whole, found)]
    rank = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*places, strict=True)])
    told = rows.compression
    assert told is not None
    assert (told.error, told.worst) == (near(errors.median()), near(errors.max()))
    assert told.rank_correlation == near(rank.median())
    short, full = (scores.self_influence(one) for one in (scores.prepare(sample, compress=0.7), sample))
    assert told.captured == near(short.sum() / full.sum())
    assert told.checked == 10
    assert 0 < told.captured < 1


def test_bytes__are_those_that_a_block_takes() -> None:
    net = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 80), nn.LayerNorm(80), nn.Linear(80, 3))
    x, y = torch.randint(20, (8, 30)), torch.randint(3, (8, 30))
    loss = fk.likelihoods.Categorical(class_axis=-1)
    scores = InfluenceScores(fk.ExactFisher(net, (x, y), structure="kfac", likelihood=loss), net)
    rows, whole = scores.prepare((x, y), compress=0.5), scores.prepare((x, y))
    told = rows.compression
    assert told is not None
    assert set(told.whole) == {"0.weight", "2.weight", "2.bias"}
    for one, number in ((rows, told.bytes), (whole, told.whole_bytes)):
        (block,) = one
        assert number == pytest.approx(
            sum(t.nbytes for slot in block.rows.slots for t in slot.rows.tensors().values()) / 8, abs=1
        )
    assert told.bytes < told.whole_bytes
    few = scores.prepare((x[:, :2], y[:, :2]), compress=0.99).compression  # two factors are fewer numbers there
    assert few is not None
    assert few.bytes < few.whole_bytes


@pytest.mark.parametrize(("compress", "larger"), [(0.5, False), (6, False), (7, True), (0.99, True)])
def test_rows_that_compression_enlarges__are_told_of_before_they_are_kept(
    compress: Any, larger: bool, tmp_path: Path
) -> None:
    """With a bias and all eigenvectors of its inputs a layer has one number more than whole."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
        x, y = torch.randn(300, 6, dtype=F64), torch.randint(6, (300,))
    scores = InfluenceScores(fk.ExactFisher(net, (x, y), structure="kfac"), net)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        rows = scores.prepare((x, y), compress=compress, most_error=2.0)
    assert rows.compression is not None
    found = [str(one.message) for one in told]
    assert larger == (rows.compression.bytes > rows.compression.whole_bytes) == bool(found)
    if larger:
        assert f"{rows.compression.bytes} bytes an example" in found[0]
        assert f"{rows.compression.whole_bytes} whole. Try: a smaller share or rank" in found[0]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match="compressed rows take"):
                scores.prepare((x, y), compress=compress, folder=tmp_path / "rows")
        assert not (tmp_path / "rows").exists()


def test_too_large_an_error__is_refused_before_anything_is_kept(tmp_path: Path) -> None:
    scores = influence()
    words = r"scores off by .* with compress=2; expected at most most_error=0.01.*bytes an example.*Try: a larger share"
    with pytest.raises(fk.InvalidArgumentError, match=words):
        scores.prepare((X, Y), compress=2, most_error=0.01, folder=tmp_path / "rows")
    assert not (tmp_path / "rows").exists()
    assert scores.prepare((X, Y), compress=2, most_error=2.0).compression is not None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compress": 0}, "compress=0"), ({"compress": 1.5}, "a number from 0 to 1"),
        ({"compress": -0.1}, "a number from 0 to 1"),
        ({"compress": "0.5"}, "of type str"), ({"compress": True}, "of type bool"),
        ({"compress": 0.5, "by": "token"}, "either of them"), ({"compress": 0.5, "checked": 0}, "checked=0"),
    ],
)  # fmt: skip
def test_bad_input__is_refused(options: Any, words: str) -> None:
    with pytest.raises((fk.InvalidArgumentError, fk.InvalidTypeError), match=words):
        influence().prepare((X, Y), **options)


@pytest.mark.parametrize("structure", ["full", "diagonal", "block"])
def test_a_fisher_without_factors__is_refused(structure: str) -> None:
    with pytest.raises(fk.InvalidArgumentError, match=r"without Kronecker factors.*kfac"):
        influence(structure=structure).prepare((X, Y), compress=0.5)


@pytest.mark.parametrize("name", [name for name, one in structures().items() if one.__module__.startswith("fisherkit")])
def test_structures__say_whether_their_rows_can_be_compressed(name: str) -> None:
    fisher = fk.EmpiricalFisher(model(), (X, Y), structure=name)
    found = [block.eigenbases is not None for block in fisher._blocks()]
    assert any(found) == structures()[name].has_eigenbases


def test_too_few_examples_to_measure_on__are_refused() -> None:
    for train in ((X[:1], Y[:1]), (X, torch.full_like(Y, -100))):
        with pytest.raises(fk.InvalidArgumentError, match="fewer than two examples"):
            influence().prepare(train, compress=0.5)
    scores = influence()
    rows = scores.prepare((X[:2], Y[:2]), compress=0.5)
    assert scores.scores(QUERIES, rows).shape == (6, 2)


def test_approximate_scores__refuse_compressed_rows() -> None:
    scores = influence()
    with pytest.raises(fk.InvalidArgumentError, match="compressed rows"):
        scores.approximate_scores(QUERIES, scores.prepare((X, Y), compress=0.5), fk.influence.LowRankQueries(3))


# -- in a folder -------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("compress", [None, 3, 0.8])
def test_a_folder__is_read_without_the_data(compress: Any, tmp_path: Path) -> None:
    written = influence().prepare(cut_data(), folder=tmp_path / "rows", compress=compress)
    other = influence()
    rows = other.read(tmp_path / "rows")
    assert rows.compression == written.compression
    assert rows.count() == 40
    same(other.scores(QUERIES, rows), other.scores(QUERIES, other.prepare((X, Y), compress=compress)))


def killed_at(number: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Interrupt the write of this file."""
    written: list[Path] = []
    original = io.replace_checked_file

    def write(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> str:
        written.append(path)
        if len(written) == number:
            raise KeyboardInterrupt
        return original(path, tensors, header)

    monkeypatch.setattr(io, "replace_checked_file", write)
    return lambda: monkeypatch.setattr(io, "replace_checked_file", original)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_an_interrupted_run__goes_on_to_the_same_bytes(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    influence().prepare(cut_data(), folder=tmp_path / "whole", compress=0.8)
    alive = killed_at(number, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        influence().prepare(cut_data(), folder=tmp_path / "rows", compress=0.8)
    if number > 1:
        with pytest.raises(fk.InvalidArgumentError, match="not finished"):
            influence().read(tmp_path / "rows")
    alive()
    influence().prepare(cut_data(), folder=tmp_path / "rows", compress=0.8)
    assert contents(tmp_path / "rows") == contents(tmp_path / "whole")
    # Another budget would cut otherwise; the run goes on as it began. Its error is measured a few queries at a time.
    (tmp_path / "rows" / "rows-000001.safetensors").unlink()
    influence(memory_budget=9_000).prepare(cut_data(), folder=tmp_path / "rows", compress=0.8)
    before, after = (contents(tmp_path / name) for name in ("whole", "rows"))
    assert [name for name in before if before[name] != after[name]] in ([], ["manifest.json"])


def test_rows_of_something_else__are_refused_and_left(tmp_path: Path) -> None:
    kept = influence().prepare(cut_data(), folder=tmp_path / "rows", compress=0.8)
    before = contents(tmp_path / "rows")
    for compress in (None, 0.7, 3):
        with pytest.raises(fk.InvalidArgumentError, match="rows with different compress"):
            influence().prepare(cut_data(), folder=tmp_path / "rows", compress=compress)
    for call in (lambda one: one.read(tmp_path / "rows"),
                 lambda one: one.prepare(cut_data(), folder=tmp_path / "rows", compress=0.8)):  # fmt: skip
        with pytest.raises(fk.FileFormatError, match="eigenvectors of another Fisher"):
            call(influence(fk.ExactFisher))
    assert contents(tmp_path / "rows") == before
    # Another damping is another inverse of the same matrix.
    damped = influence(damping=0.3)
    for other in (influence(), damped):
        with pytest.raises(fk.InvalidArgumentError, match="another Fisher or damping"):
            other.scores(QUERIES, kept)
    same(damped.scores(QUERIES, damped.read(tmp_path / "rows")), sum(expected_on(tmp_path / "rows", 0.3)))


def expected_on(folder: Path, damping: float) -> list[Tensor]:
    """By the eigenvectors that a folder holds."""
    from safetensors.torch import load_file

    kept, found = load_file(folder / "basis.safetensors"), []
    for i, ((a, g), (b, h)) in enumerate(zip(layers(X, Y), layers(*QUERIES), strict=True)):
        u, v, e = (kept[f"{i}.{name}"] for name in ("inputs", "outputs", "values"))
        pair = [torch.einsum("no,ni->noi", left @ v, right @ u).flatten(1) for left, right in ((g, a), (h, b))]
        found.append((pair[1] / (e + damping)) @ pair[0].mT / len(X))
    return found


@pytest.mark.parametrize("how", ["bit", "cut", "gone", "another"])
def test_eigenvectors__that_are_damaged_are_made_anew_as_the_error_says(how: str, tmp_path: Path) -> None:
    influence().prepare(cut_data(), folder=tmp_path / "rows", compress=0.8)
    path, whole = tmp_path / "rows" / "basis.safetensors", contents(tmp_path / "rows")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    if how == "gone":
        path.unlink()
    elif how == "another":
        influence().prepare(cut_data(), folder=tmp_path / "other", compress=0.3)
        path.write_bytes((tmp_path / "other" / "basis.safetensors").read_bytes())
    else:
        path.write_bytes(content if how == "bit" else content[:-9])
    with pytest.raises(fk.FileFormatError, match=r"delete .*basis.safetensors, and prepare\(train, folder=.*rows'"):
        influence().read(tmp_path / "rows")
    path.unlink(missing_ok=True)
    influence().prepare(cut_data(), folder=tmp_path / "rows", compress=0.8)
    assert contents(tmp_path / "rows") == whole
    influence().read(tmp_path / "rows")


@pytest.mark.parametrize("name", ["rows-000001.safetensors", "basis.safetensors", "manifest.json"])
def test_a_damaged_file__is_refused(name: str, tmp_path: Path) -> None:
    scores = influence()
    rows = scores.prepare(cut_data(), folder=tmp_path / "rows", compress=0.8)
    path, whole = tmp_path / "rows" / name, contents(tmp_path / "rows")
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)
    with pytest.raises(fk.FileFormatError):
        list(influence().read(tmp_path / "rows"))
    if name.startswith("rows"):
        with pytest.raises(fk.FileFormatError, match=r"rows-000001.safetensors, which is missing or damaged"):
            scores.scores(QUERIES, rows)
    if name == "manifest.json":
        with pytest.raises(fk.FileFormatError, match=r"delete this one: its rows are then made again"):
            scores.prepare(cut_data(), folder=tmp_path / "rows", compress=0.8)
        return
    scores.prepare(cut_data(), folder=tmp_path / "rows", compress=0.8)
    assert contents(tmp_path / "rows") == whole
    same(scores.scores(QUERIES, rows), sum(expected(0.8, scores.damping)))
    path.unlink()
    scores.prepare(cut_data(), folder=tmp_path / "rows", compress=0.8)
    assert contents(tmp_path / "rows") == whole


# -- several processes -------------------------------------------------------------------------------------------------


def write(rank: int, size: int, folder: str, compress: Any, wrong: str, options: dict[str, Any] | None = None) -> Any:
    """A process's part of the rows, and what it reads back."""
    net = model()
    if wrong == "slow" and rank == 1:
        exists = Path.exists

        def waiting(path: Path) -> bool:
            """Each look at a file is an old one when it is used: the other process has written meanwhile."""
            found = exists(path)
            time.sleep(0.5 * (path.suffix != ""))
            return found

        Path.exists = waiting  # type: ignore[method-assign]
    if wrong == "folder" and rank == 1:
        folder += "-2"
    if wrong == "weights" and rank == 1:
        net[0].weight.data.add_(1)
    kind = fk.ExactFisher if (wrong, rank) == ("fisher", 1) else fk.EmpiricalFisher
    damping = 0.3 if (wrong, rank) == ("damping", 1) else None
    scores = InfluenceScores(kind(net, (X, Y), structure="kfac", group=False), net, damping=damping)
    own = cut_data()[:1] if rank == 0 else cut_data()[1:] if size == 2 else cut_data()[rank : rank + 1]
    if wrong == "data" and rank == 1:
        own = [(X[:3], Y[:3] - 200)]
    options = {"folder": folder, **(options or {})}
    if wrong == "queries" and rank == 1:
        options["queries"] = QUERIES[0][:5], QUERIES[1][:5]
    if wrong in ("memory", "no queries") and rank == 1:
        options["folder" if wrong == "memory" else "queries"] = None
    rows: RowBlocks = scores.prepare(own, compress=compress, **options)
    whole = scores.read(folder)
    return rows.count(), scores.scores(QUERIES, whole), scores.top(QUERIES, whole, 3).helpful_index


@pytest.mark.parametrize(
    ("size", "compress", "options"),
    [
        (2, None, {}), (2, 0.8, {}), (2, 0.8, {"queries": QUERIES}), (3, 3, {"checked": 6}),
        # The last rank has none of the examples that are checked.
        (3, 0.8, {"checked": 2}), (3, 0.8, {"checked": 2, "queries": QUERIES}),
    ],
)  # fmt: skip
def test_several_processes__write_what_one_writes(
    size: int, compress: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    one = influence()
    rows = one.prepare(cut_data(), folder=tmp_path / "one", compress=compress, **options)
    for _ in range(2):  # made, and there
        found = ranks.run(size, write, str(tmp_path / "some"), compress, "", options)
        assert not any(isinstance(one, str) for one in found), found  # what a process raised
        for examples, (count, scores, index) in zip((13, 27) if size == 2 else (13, 17, 10), found, strict=True):
            assert count == examples
            same(scores, one.scores(QUERIES, rows))
            assert torch.equal(index, one.top(QUERIES, rows, 3).helpful_index)
        assert contents(tmp_path / "one") == contents(tmp_path / "some")
    one.prepare(cut_data(), folder=tmp_path / "some", compress=compress, **options)  # which goes on from there alone
    assert contents(tmp_path / "one") == contents(tmp_path / "some")


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.first, self.last = nn.Embedding(20, 8), nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.last(self.first(self.embedding(ids)).tanh().mean(1))
        return found


def write_texts(rank: int, size: int, folder: str, compress: Any) -> None:
    """Of long texts a layer's rows are fewer numbers written out, of short ones as factors: the first batch decides."""
    torch.manual_seed(0)
    net = Words()
    texts = [(torch.randint(20, (10, length)), torch.randint(4, (10,))) for length in (40, 30, 3, 2)]
    scores = InfluenceScores(fk.EmpiricalFisher(net, texts, structure="ekfac", group=False), net)
    scores.prepare(texts[4 * rank // size : 4 * (rank + 1) // size], folder=folder, compress=compress)


@pytest.mark.parametrize("compress", [None, 0.5])
def test_processes_with_batches_of_other_lengths__write_what_one_writes(compress: Any, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        write_texts(0, 1, str(tmp_path / "one"), compress)
    assert ranks.run(2, write_texts, str(tmp_path / "two"), compress) == [None, None]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("options", [{"checked": 5}, {"checked": 5, "queries": QUERIES}])
def test_most_error__refuses_in_several_processes_what_it_refuses_in_one(
    options: dict[str, Any], tmp_path: Path
) -> None:
    told = influence().prepare(cut_data(), compress=0.5, **options).compression
    assert told is not None
    for most, refused in ((told.error * 0.999, True), (told.error * 1.001, False)):
        found = ranks.run(2, write, str(tmp_path / "some"), 0.5, "", options | {"most_error": most})
        assert ["at most most_error" in str(one) for one in found] == [refused, refused]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("data", "an error in rank 1"), ("weights", "different parameters_hash"),
        ("fisher", "another Fisher or damping"), ("damping", "another Fisher or damping"),
        ("queries", "different queries"), ("no queries", "different queries in some processes"),
        ("memory", "different folder in some processes (rank 0: a path; rank 1: None)"),
    ],
)  # fmt: skip
def test_an_error_in_one_process__is_one_in_all(wrong: str, words: str, tmp_path: Path) -> None:
    found = ranks.run(2, write, str(tmp_path / "rows"), 0.8, wrong, {"queries": QUERIES})
    assert "ProcessError" in found[0]
    assert words in found[0]
    assert "Error" in found[1]
    assert not (tmp_path / "rows").exists()


def test_a_manifest__that_is_seen_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    influence().prepare((X, Y), folder=tmp_path / "rows")
    manifest = tmp_path / "rows" / "manifest.json"
    begun, text = blocks._manifest(tmp_path / "rows"), manifest.read_text("utf-8")
    for seen in (None, "{", text.replace('"limit"', '"limits"')):  # before, while and long before it is written
        manifest.unlink() if seen is None else manifest.write_text(seen, "utf-8")
        with ThreadPoolExecutor() as pool:
            other = pool.submit(lambda: (time.sleep(0.2), manifest.write_text(text, "utf-8")))
            blocks._refuse_elsewhere(tmp_path / "rows", begun)
        other.result()
    manifest.unlink()
    monkeypatch.setattr(blocks, "PATIENCE", 0.1)
    with pytest.raises(fk.InvalidArgumentError, match="not where the first process has begun"):
        blocks._refuse_elsewhere(tmp_path / "rows", begun)


def test_eigenvectors__in_a_file_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, read = list[str](), io.read_tensors

    def counted(path: Path, *rest: Any) -> Any:
        found = read(path, *rest)
        reads.append(path.name)
        return found

    monkeypatch.setattr(io, "read_tensors", counted)
    for times in (0, 1):  # made, and there
        reads.clear()
        influence().prepare((X, Y), folder=tmp_path / "rows", compress=0.5)
        assert reads.count("basis.safetensors") == times
    (tmp_path / "rows" / "basis.safetensors").write_bytes(b"damaged")
    influence().prepare((X, Y), folder=tmp_path / "rows", compress=0.5)
    influence().read(tmp_path / "rows")


def test_a_process__that_looks_late_finds_what_the_first_one_has_begun(tmp_path: Path) -> None:
    for one in ranks.run(2, write, str(tmp_path / "rows"), 0.8, "slow"):
        assert not isinstance(one, str), one


@pytest.mark.parametrize("there", ["nothing", "other rows"])
def test_another_folder_in_another_process__is_refused(there: str, tmp_path: Path) -> None:
    if there == "other rows":
        influence().prepare(cut_data(), folder=tmp_path / "rows-2", compress=0.7)
    first, second = ranks.run(2, write, str(tmp_path / "rows"), 0.8, "folder")
    assert "an error in rank 1" in first
    assert "rows-2, which is not where the first process has begun" in second
    assert not list(tmp_path.glob("rows/rows-*"))


def test_prepare__into_a_folder_of_another_damping_is_refused(tmp_path: Path) -> None:
    influence(damping=5.0).prepare((X, Y), folder=tmp_path / "rows", compress=0.5)
    with pytest.raises(fk.InvalidArgumentError, match="rows with different compress"):
        influence(damping=1e-4).prepare((X, Y), folder=tmp_path / "rows", compress=0.5)
