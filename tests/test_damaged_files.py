"""Files that were damaged: each is refused by an error that names it, or comes back as it was written, bit for bit.

Damages are drawn at random, from seeds, over every kind of file that the package writes.
"""

import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fisherkit as fk
from examples.influence.evaluation.retraining import Retraining, RunsFile
from fisherkit import io, solvers
from fisherkit.continual import EWC
from fisherkit.errors import FileFormatError, FisherkitError
from fisherkit.influence import InfluenceScores
from fisherkit.model_state import state_hash
from fisherkit.operators import DiagonalOperator, FisherOperator, load, open_file, state_of
from fisherkit.space import ParameterSpace
from tests.operator_cases import CASES, LAYER, block_diagonal, diagonal, kronecker, normal
from tests.reference.zoo import Compose
from tests.small_data import X, Y, cut, mlp


def plain(value: Any) -> Any:
    """What can be compared by ``==``, to the last bit: tensors as their type, shape and bytes."""
    if isinstance(value, Tensor):
        return (
            str(value.dtype),
            tuple(value.shape),
            value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
    if isinstance(value, io.State):
        return plain([value.tag, value.names, value.tensors, value.options, value.children])
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


# -- kinds of files ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Specimen:
    """A kind of file: how a folder of it is written, and all that the package reads from it."""

    write: Callable[[Path], object]
    read: Callable[[Path], Any]


def fisher(make: Callable[[], FisherOperator], size: int | None = None) -> Specimen:
    def read(folder: Path) -> Any:
        path = folder / "f.safetensors"
        whole = load(path)
        file = open_file(path)
        blocks = [state_of(file.read(names)) for names in file.blocks]
        return plain([state_of(whole), whole.space.shapes, whole.metadata, blocks, file.metadata])

    return Specimen(lambda folder: make().save(folder / "f.safetensors", max_shard_size=size), read)


def model_of_words() -> Compose:
    torch.manual_seed(0)
    return Compose(lambda m, tokens: m.head(m.table(tokens).mean(1)), table=nn.Embedding(7, 3), head=nn.Linear(3, 2))


def words(structure: str) -> FisherOperator:
    return fk.EmpiricalFisher(
        model_of_words(), (torch.arange(12).reshape(4, 3) % 7, torch.tensor([0, 1, 1, 0])), structure=structure
    )


def of(name: str, dtype: torch.dtype = torch.float32) -> Callable[[], FisherOperator]:
    def make() -> FisherOperator:
        operator, _ = CASES[name](dtype)
        operator.metadata = {"kind": "ief", "examples": "120", "note": "λ"}
        return operator

    return make


def built(structure: str) -> Callable[[], FisherOperator]:
    return lambda: fk.EmpiricalFisher(mlp(), (X, Y), structure=structure)


def ewc_state(folder: Path) -> None:
    ewc = EWC(mlp(), 0.5)
    ewc.consolidate(fk.ExactFisher(ewc.model, (X, Y), structure="kfac"))
    ewc.consolidate(fk.ExactFisher(ewc.model, (X, Y), structure="diagonal"))
    torch.save(ewc.state_dict(), folder / "ewc.pt")


def read_ewc(folder: Path) -> Any:
    ewc = EWC(mlp(), 0.5)
    ewc.load_state_dict(torch.load(folder / "ewc.pt", weights_only=True))
    return plain(ewc.get_extra_state())


def optimizer(structure: str) -> tuple[nn.Module, fk.optim.NaturalGradient]:
    model = mlp()
    return model, fk.optim.NaturalGradient(model, 0.1, damping=0.1, structure=structure, ema=0.9, momentum=0.9)


def optimizer_state(structure: str) -> Specimen:
    def write(folder: Path) -> None:
        model, own = optimizer(structure)
        for _ in range(2):
            own.zero_grad()
            nn.functional.cross_entropy(model(X), Y).backward()
            own.step()
        torch.save(own.state_dict(), folder / "optimizer.pt")

    def read(folder: Path) -> Any:
        _, own = optimizer(structure)
        own.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
        found = own.state_dict()
        return plain([found["state"], found["curvature"]])  # groups may be edited, and have no checksum

    return Specimen(write, read)


def written_solve(folder: Path) -> solvers._File:
    rhs = normal(20, 2, seed=1)
    return solvers._File(folder / "solve.safetensors", 0.25, rhs)


def write_solve(folder: Path) -> None:
    file = written_solve(folder)
    assert file.load(lambda: normal(20, 2, seed=3)) is None
    file.save(normal(20, 2, seed=2), 17, 19)


def read_solve(folder: Path) -> Any:
    return plain(list(written_solve(folder).load(lambda: normal(20, 2, seed=3)) or "no file"))


def write_runs(folder: Path) -> None:
    masks = torch.tensor([[True, False], [True, True]])
    file = RunsFile(folder / "runs.safetensors", {"seeds": [0, 1]}, masks, ["loss"], (2, 2, 3), 0.0, "retrain")
    outputs, losses = normal(4, 3, seed=5), normal(4, seed=6)
    for place in range(4):
        file.put(place // 2, place % 2, {"loss": outputs[place]}, losses[place])


def read_runs(folder: Path) -> Any:
    return plain(vars(Retraining.load(folder / "runs.safetensors")))


FISHERS: dict[str, Specimen] = {
    **{name: fisher(of(name)) for name in CASES},
    **{f"built_{s}": fisher(built(s)) for s in ("full", "block", "diagonal", "kfac", "ekfac")},
    **{f"words_{s}": fisher(lambda s=s: words(s)) for s in ("full", "block", "kfac")},
    "multiple": fisher(lambda: 2.0 * built("full")()),
    "shards_diagonal": fisher(of("diagonal", torch.float64), 40),
    "shards_sum": fisher(of("sum_of_blocks"), 200),
    "shards_full": fisher(built("full"), 300),
}
STATES: dict[str, Specimen] = {
    "solve": Specimen(write_solve, read_solve),
    "retraining": Specimen(write_runs, read_runs),
}
PICKLED: dict[str, Specimen] = {
    "ewc": Specimen(ewc_state, read_ewc),
    "optimizer_kfac": optimizer_state("kfac"),
    "optimizer_diagonal": optimizer_state("diagonal"),
}

# -- kinds of damage ---------------------------------------------------------------------------------------------------


def header_end(content: bytes) -> int:
    return 8 + int(struct.unpack("<Q", content[:8])[0])


def a_bit(content: bytes, draw: random.Random, start: int, stop: int) -> bytes:
    place = draw.randrange(start, stop)
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def sixteen_bytes(content: bytes, draw: random.Random, start: int, stop: int) -> bytes:
    place = draw.randrange(start, max(start + 1, stop - 15))
    size = min(16, stop - place)
    return content[:place] + draw.randbytes(size) + content[place + size :]


def a_byte(content: bytes, draw: random.Random, start: int, stop: int) -> bytes:
    place = draw.randrange(start, stop)
    return content[:place] + bytes([draw.choice([b for b in range(256) if b != content[place]])]) + content[place + 1 :]


def a_digit(content: bytes, draw: random.Random, start: int, stop: int) -> bytes:
    place = draw.choice([i for i in range(start, stop) if content[i] in b"0123456789"])
    other = draw.choice([b for b in b"0123456789" if b != content[place]])
    return content[:place] + bytes([other]) + content[place + 1 :]


TENSORS = {"bit": a_bit, "sixteen": sixteen_bytes}
"""Damages of values: each must be refused."""
HEADER = {"byte": a_byte, "header_bit": a_bit, "digit": a_digit, "header_sixteen": sixteen_bytes}
"""Damages of what is told of them; white space may change."""
WHOLE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "length": lambda content, draw: a_byte(content, draw, 0, 8),
    "cut": lambda content, draw: content[: draw.randrange(1, len(content))],
    "lengthened": lambda content, draw: content + draw.randbytes(draw.randrange(1, 40)),
    "empty": lambda content, draw: b"",
}
"""Damages of the file: each must be refused."""


def damaged(kind: str, content: bytes, draw: random.Random) -> bytes:
    if kind in WHOLE:
        return WHOLE[kind](content, draw)
    end = header_end(content)
    return TENSORS[kind](content, draw, end, len(content)) if kind in TENSORS else HEADER[kind](content, draw, 8, end)


def outcome(read: Callable[[Any], Any], of: Any) -> tuple[Any, str]:
    """What is read, or the package's error; any other is none of the right answers."""
    try:
        return read(of), ""
    except FisherkitError as error:
        return None, str(error)


def safetensors_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")


TRIES = {"bit": 4, "sixteen": 3, "byte": 6, "header_bit": 5, "digit": 5, "header_sixteen": 2, "length": 2, "cut": 2,
         "lengthened": 1, "empty": 1}  # fmt: skip
assert len(FISHERS | STATES) * sum(TRIES.values()) > 500


@pytest.mark.parametrize("name", FISHERS | STATES)
def test_reading__refuses_a_damaged_file_or_gives_what_was_written(name: str, tmp_path: Path) -> None:
    specimen = (FISHERS | STATES)[name]
    specimen.write(tmp_path)
    written = specimen.read(tmp_path)
    draw = random.Random(name)
    files = safetensors_of(tmp_path)
    for kind, tries in TRIES.items():
        for _ in range(tries):
            path = draw.choice(files)
            whole = path.read_bytes()
            content = damaged(kind, whole, draw)
            path.write_bytes(content)
            found, said = outcome(specimen.read, tmp_path)
            if said:
                assert path.name in said
                assert kind not in TENSORS or "tensor '" in said
            else:
                assert content == whole or kind in HEADER, kind
                assert found == written, kind
            path.write_bytes(whole)
    assert specimen.read(tmp_path) == written


@pytest.mark.parametrize("name", [name for name in FISHERS if name.startswith("shards")])
def test_reading__refuses_a_damaged_index_or_gives_what_was_written(name: str, tmp_path: Path) -> None:
    specimen = FISHERS[name]
    specimen.write(tmp_path)
    written = specimen.read(tmp_path)
    draw = random.Random(name)
    (index,) = (path for path in tmp_path.iterdir() if path.suffix == ".json")
    whole = index.read_bytes()
    for kind in [a_bit, a_byte, a_digit] * 20 + [sixteen_bytes] * 5:
        index.write_bytes(kind(whole, draw, 0, len(whole)))
        found, said = outcome(specimen.read, tmp_path)
        assert "f.safetensors" in said if said else found == written
    for stop in (0, 1, len(whole) // 2, len(whole) - 1):
        index.write_bytes(whole[:stop])
        with pytest.raises(FileFormatError, match=index.name):
            specimen.read(tmp_path)


@pytest.mark.parametrize("name", PICKLED)
def test_load_state_dict__refuses_a_damaged_state_or_gives_what_was_saved(name: str, tmp_path: Path) -> None:
    """torch.load compares nothing: what passes it must be what was saved. The standard library's zipfile compares."""
    specimen = PICKLED[name]
    specimen.write(tmp_path)
    written = specimen.read(tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    draw = random.Random(name)
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    refused = 0
    for _ in range(60):
        member = draw.choice([m for m in members if "/data/" in m.filename and m.file_size > 4])
        name_length, extra_length = struct.unpack("<HH", whole[member.header_offset + 26 : member.header_offset + 30])
        start = member.header_offset + 30 + name_length + extra_length
        path.write_bytes(draw.choice([a_bit, sixteen_bytes])(whole, draw, start, start + member.file_size))
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() == member.filename
        with pytest.raises(FisherkitError, match="by its checksum"):
            specimen.read(tmp_path)
    for _ in range(60):
        path.write_bytes(draw.choice([a_bit, a_byte])(whole, draw, 0, len(whole)))
        try:
            state = torch.load(path, weights_only=True)
        except Exception:  # noqa: BLE001 - torch's, in the user's own call
            refused += 1
            continue
        del state
        found, said = outcome(specimen.read, tmp_path)
        refused += bool(said)
        assert said or found == written
    assert refused > 5


def test_rows__in_a_folder_are_made_again_or_refused_when_damaged(tmp_path: Path) -> None:
    model = mlp()
    scores = InfluenceScores(fk.EmpiricalFisher(model, (X, Y), structure="diagonal"), model)
    folder = tmp_path / "rows"
    prepared = scores.prepare(cut(3, 4), folder=folder)
    written = plain(scores.self_influence(prepared))
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    draw = random.Random(7)
    for kind in [kind for kind in TRIES for _ in range(3)]:
        path = draw.choice(safetensors_of(folder))
        path.write_bytes(damaged(kind, contents[path.name], draw))
        found, said = outcome(scores.self_influence, prepared)
        assert path.name in said if said else plain(found) == written
        scores.prepare(cut(3, 4), folder=folder)
        if kind in TENSORS:
            assert path.read_bytes() == contents[path.name]
        path.write_bytes(contents[path.name])
    manifest = folder / "manifest.json"
    whole = manifest.read_bytes()
    for kind in [a_bit, a_byte, a_digit] * 10:
        manifest.write_bytes(kind(whole, draw, 0, len(whole)))
        again, said = outcome(lambda path: scores.prepare(cut(3, 4), folder=path), folder)
        assert "manifest" in said if said else plain(scores.self_influence(again)) == written
    for text in (b"", whole[:100], b"\xff\xfe", b"[" * 100_000, whole.replace(b'"limit"', b'"limit": 1e999, "x"')):
        manifest.write_bytes(text)
        with pytest.raises(FileFormatError, match="a manifest that cannot be read"):
            scores.prepare(cut(3, 4), folder=folder)


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_load__tells_two_tensors_of_one_shape_that_were_swapped(tmp_path: Path) -> None:
    path = tmp_path / "f"
    space = ParameterSpace(("w",), ((3, 3),))
    operator, _ = kronecker(torch.float32, space, inputs=3)
    operator.save(path)
    content = path.read_bytes()
    end = header_end(content)
    first, second = content[end : end + 36], content[end + 36 :]
    assert first != second
    path.write_bytes(content[:end] + second + first)
    with pytest.raises(FileFormatError, match=r"tensor '(activation|gradient)': its values are not those"):
        load(path)
    # Or their places, in the header:
    header = json.loads(content[8:end])
    one, two = header["activation"], header["gradient"]
    one["data_offsets"], two["data_offsets"] = two["data_offsets"], one["data_offsets"]
    path.write_bytes(of_header(json.dumps(header).encode(), content[end:]))
    with pytest.raises(FileFormatError, match=r"tensor '(activation|gradient)'"):
        load(path)


def of_header(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def test_read__compares_lazily_and_only_what_it_reads(tmp_path: Path) -> None:
    """A whole block can be read from a file of which another is damaged; opening it compares the description."""
    path = tmp_path / "f"
    block_diagonal(torch.float64)[0].save(path)
    content = path.read_bytes()
    end = header_end(content)
    begin, stop = json.loads(content[8:end])["1.matrix"]["data_offsets"]
    path.write_bytes(content[: end + begin] + b"\xff" * (stop - begin) + content[end + stop :])
    file = open_file(path)
    assert file.read(["z"]).size == 1
    with pytest.raises(FileFormatError, match=r"open_file\('.*f'\): .*tensor '1.matrix': its values are not those"):
        file.read(["y.weight"])
    path.write_bytes(content.replace(b"diagonal", b"diagonam", 1))
    with pytest.raises(FileFormatError, match="its description is not what was written"):
        open_file(path)


@pytest.mark.parametrize("size", [None, 40, 104])
def test_read__of_a_diagonals_slice_compares_the_pieces_around_it(
    size: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces that are no multiple of a number's eight bytes, and blocks that begin and end anywhere."""
    monkeypatch.setattr("fisherkit.io.checksums.PIECE", 20)
    space = ParameterSpace(("a", "b", "c", "d"), ((5,), (1,), (2, 3), (9,)))
    operator, _ = diagonal(torch.float64, space)
    operator.save(tmp_path / "f.safetensors", max_shard_size=size)
    entries = dict(zip(space.names, operator.diagonal().split([5, 1, 6, 9]), strict=True))
    for names in (["a"], ["b"], ["c"], ["d"], ["a", "c"], ["a", "b", "c", "d"]):
        found = open_file(tmp_path / "f.safetensors").read(names).diagonal()
        assert torch.equal(found, torch.cat([entries[name] for name in names]))
    files = safetensors_of(tmp_path)
    start = 0
    for path in files:
        content = path.read_bytes()
        end = header_end(content)
        for number in range((len(content) - end) // 8):
            place = end + 8 * number + number % 8
            path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
            name = "aaaaabccccccddddddddd"[start + number]
            with pytest.raises(FileFormatError, match=f"{path.name}.*tensor 'diagonal"):
                open_file(tmp_path / "f.safetensors").read([name])
        path.write_bytes(content)
        start += (len(content) - end) // 8
    assert start == 21


def stripped(path: Path, *keys: str) -> None:
    """A file as versions before checksums wrote it."""
    content = path.read_bytes()
    end = header_end(content)
    header = json.loads(content[8:end])
    for key in keys:
        del header["__metadata__"][key]
    path.write_bytes(of_header(json.dumps(header).encode(), content[end:]))


@pytest.mark.parametrize("name", ["diagonal", "sum_of_blocks", "built_full"])
def test_load__of_a_file_without_checksums_says_that_it_has_none(name: str, tmp_path: Path) -> None:
    FISHERS[name].write(tmp_path)
    path = tmp_path / "f.safetensors"
    before, tensors = load(path), plain(state_of(load(path)))
    assert open_file(path).has_checksums
    stripped(path, "checksum", "checksums")
    after = load(path)
    assert plain(state_of(after)) == tensors
    assert after.metadata == before.metadata | {"checksums": "none"}
    assert not open_file(path).has_checksums
    for block in open_file(path).blocks:
        open_file(path).read(block)
    after.save(path)  # has them now
    assert load(path).metadata == before.metadata
    for key in ("checksum", "checksums"):
        FISHERS[name].write(tmp_path)
        stripped(path, key)
        with pytest.raises(FileFormatError, match="its description is not what was written"):
            load(path)


def test_load__of_shards_without_checksums_says_that_they_have_none(tmp_path: Path) -> None:
    FISHERS["shards_sum"].write(tmp_path)
    written = FISHERS["shards_sum"].read(tmp_path)
    (index,) = (path for path in tmp_path.iterdir() if path.suffix == ".json")
    found = json.loads(index.read_text("utf-8"))
    del found["metadata"]["checksum"], found["metadata"]["checksums"]
    index.write_text(json.dumps(found), "utf-8")
    assert FISHERS["shards_sum"].read(tmp_path)[0] == written[0]
    assert load(tmp_path / "f.safetensors").metadata["checksums"] == "none"


def test_states__without_checksums_still_load(tmp_path: Path) -> None:
    for name in STATES:
        STATES[name].write(tmp_path)
        written = STATES[name].read(tmp_path)
        for path in safetensors_of(tmp_path):
            stripped(path, "checksum", "checksums")
        assert STATES[name].read(tmp_path) == written
        for path in safetensors_of(tmp_path):
            path.unlink()


@pytest.mark.parametrize("name", PICKLED)
def test_states__of_torch_without_checksums_still_load(name: str, tmp_path: Path) -> None:
    PICKLED[name].write(tmp_path)
    written = PICKLED[name].read(tmp_path)
    (path,) = tmp_path.iterdir()
    state = torch.load(path, weights_only=True)
    if name == "ewc":
        assert len(state["_extra_state"].pop("checksum")) == 64
    else:
        assert len(state["curvature"].pop("checksum")) == len(state.pop("state_checksum")) == 64
        state["param_groups"][0]["lr"] = 0.05  # what schedules and people change is not compared
    torch.save(state, path)
    assert PICKLED[name].read(tmp_path) == written


FORMS = {
    "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 3), "no columns": torch.zeros(3, 0),
    "half": normal(5, 3, seed=1).half(), "bfloat16": normal(5, 3, seed=1).bfloat16(), "bool": torch.ones(7).bool(),
    "integers": torch.arange(24).reshape(2, 3, 4), "turned": normal(5, 3, seed=1).T,
}  # fmt: skip


@pytest.mark.parametrize("piece", [8, 1 << 20])
def test_read_tensors__compares_tensors_of_every_form(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fisherkit.io.checksums.PIECE", piece)
    path = tmp_path / "f"
    io.replace_checked_file(path, FORMS, {"format": "fisherkit-test"})
    _, found = io.read_tensors(path, "cpu", "read", "a test")
    assert plain(found) == plain(FORMS)
    content = path.read_bytes()
    end = header_end(content)
    for place in range(end, len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(FileFormatError, match=r"tensor '.*': its values are not those"):
            io.read_tensors(path, "cpu", "read", "a test")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("size", [None, 40])
def test_load__to_an_accelerator_compares_too(size: int | None, tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    operator = DiagonalOperator(LAYER, (normal(15, seed=0).square() + 0.05).cuda())
    operator.save(path, max_shard_size=size)
    assert torch.equal(load(path, device="cuda").diagonal(), operator.diagonal())
    assert open_file(path, device="cuda").read("l.bias").device.type == "cuda"
    file = safetensors_of(tmp_path)[-1]
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    for read in (lambda: load(path, device="cuda"), lambda: open_file(path, device="cuda").read("l.bias")):
        with pytest.raises(FileFormatError, match="tensor 'diagonal"):
            read()


def test_state_hash__tells_states_and_not_their_containers() -> None:
    def hashed(**changes: Any) -> str:
        return state_hash({"a": 1.5, "b": [torch.ones(3), {"c": None, 4: "x"}], **changes})

    assert hashed() == state_hash({"b": (torch.ones(3), {4: "x", "c": None}), "a": 1.5})
    others: list[dict[str, Any]] = [
        {"a": 1.5000000000000002}, {"a": True}, {"d": 0}, {"b": [torch.ones(3).double(), {"c": None, 4: "x"}]},
        {"b": [torch.ones(3, 1), {"c": None, 4: "x"}]}, {"b": [torch.tensor([1, 1, 1 + 1e-7]), {"c": None, 4: "x"}]},
        {"b": [torch.ones(3), {"c": None, "4": "x"}]}, {"b": [{"c": None, 4: "x"}, torch.ones(3)]},
    ]  # fmt: skip
    assert len({hashed(**other) for other in others} | {hashed()}) == 1 + len(others)


def test_load__accepts_what_the_page_on_the_format_says_of_checksums(tmp_path: Path) -> None:
    """Written with the standard library alone, of more than one piece."""
    values = torch.rand(400_000, dtype=torch.float64)
    raw = values.numpy().tobytes()
    crc = "".join(f"{zlib.crc32(raw[i : i + 2**20]):08x}" for i in range(0, len(raw), 2**20))
    tree = {"kind": "diagonal", "names": ["w"], "tensors": {"diagonal": "d"}, "options": {}, "children": []}
    header = {
        "format": "fisherkit", "version": "1", "space": '{"w": [400000]}', "operator": json.dumps(tree),
        "metadata": '{"note": "λ"}',
        "checksums": json.dumps({"d": {"dtype": "float64", "shape": [400_000], "crc32": crc}}),
    }  # fmt: skip
    header["checksum"] = f"{zlib.crc32(json.dumps(header, sort_keys=True).encode()):08x}"
    save_file({"d": values}, tmp_path / "f", metadata=header)
    found = load(tmp_path / "f")
    assert torch.equal(found.diagonal(), values)
    assert found.metadata == {"note": "λ"}
    save_file({"d": values.float()}, tmp_path / "f", metadata=header)
    with pytest.raises(FileFormatError, match=r"tensor 'd': float32 \[400000\] where float64 \[400000\] was written"):
        load(tmp_path / "f")
    save_file({"d": values, "e": values.clone()}, tmp_path / "f", metadata=header)
    with pytest.raises(FileFormatError, match=r"tensors and checksums differ in \['e'\]"):
        load(tmp_path / "f")


# -- headers that nobody writes by accident ----------------------------------------------------------------------------

TREE = {"kind": "diagonal", "names": ["w"], "tensors": {"diagonal": "d"}, "options": {}, "children": []}
META = {"format": "fisherkit", "version": "1", "space": '{"w": [4]}', "operator": json.dumps(TREE), "metadata": "{}"}
D = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


def crafted(tensors: dict[str, Any], **entries: Any) -> bytes:
    return json.dumps({"__metadata__": META | entries, **tensors}).encode()


def tree(**entries: Any) -> str:
    return json.dumps(TREE | entries)


DEEP = "[" * 100_000 + "]" * 100_000
NESTED = '{"kind": "sum", "names": ["w"], "tensors": {}, "options": {}, "children": ['
MALICIOUS: dict[str, bytes] = {
    "offsets that overlap": crafted({"d": D, "e": D}),
    "offsets out of range": crafted({"d": D | {"data_offsets": [16, 32]}}),
    "offsets the wrong way": crafted({"d": D | {"data_offsets": [16, 0]}}),
    "a negative offset": crafted({"d": D | {"data_offsets": [-16, 0]}}),
    "an offset beyond 64 bits": crafted({"d": D | {"data_offsets": [0, 2**64 + 16]}}),
    "a huge shape": crafted({"d": D | {"shape": [2**62, 4]}}),
    "a shape beyond 64 bits": crafted({"d": D | {"shape": [2**64]}}),
    "a huge shape of nothing": crafted({"d": D | {"shape": [0, 2**63], "data_offsets": [0, 0]}}),
    "a negative side": crafted({"d": D | {"shape": [-4]}}),
    "a dtype that is none": crafted({"d": D | {"dtype": "F31"}}),
    "a dtype of integers": crafted({"d": D | {"dtype": "I32"}}),
    "a dtype of four bits": crafted({"d": D | {"dtype": "F4", "shape": [32]}}),
    "a complex dtype": crafted({"d": D | {"dtype": "C64", "shape": [2]}}),
    "a tensor twice": crafted({"d": D}).replace(b'"d": {', b'"d": {"dtype": "I8", "shape": [16]}, "d": {'),
    "metadata twice": crafted({"d": D}).replace(b'"d": {', b'"__metadata__": {}, "d": {'),
    "a dtype twice": crafted({"d": D}).replace(b'"dtype"', b'"dtype": "I32", "dtype"'),
    "metadata that is null": json.dumps({"__metadata__": None, "d": D}).encode(),
    "metadata of numbers": json.dumps({"__metadata__": META | {"version": 1}, "d": D}).encode(),
    "bytes that are not UTF-8": crafted({"d": D}).replace(b'"d": {', b'"\xff": {'),
    "half a surrogate": crafted({"d": D}).replace(b'"d": {', b'"\\ud800": {'),
    "a zero byte in a name": crafted({"d\0": D}),
    "nothing": b"",
    "a list": b"[]",
    "a deep list": DEEP.encode(),
    "an operator deep down": crafted({"d": D}, operator=DEEP),
    "a space deep down": crafted({"d": D}, space='{"w": ' + DEEP + "}"),
    "sums of sums": crafted({"d": D}, operator=NESTED * 400 + tree() + "]}" * 400),
    "sums of sums of sums": crafted({"d": D}, operator=NESTED * 20_000 + tree() + "]}" * 20_000),
    "a parameter twice": crafted({"d": D}, space='{"w": [4], "w": [4]}'),
    "a space of fractions": crafted({"d": D}, space='{"w": [4.0]}'),
    "a space of texts": crafted({"d": D}, space='{"w": "4"}'),
    "a space of infinity": crafted({"d": D}, space='{"w": [Infinity]}'),
    "a space of negative sides": crafted({"d": D}, space='{"w": [-2, -2]}'),
    "a huge space": crafted({"d": D}, space=f'{{"w": [{10**30}]}}'),
    "an integer of many digits": crafted({"d": D}, space=f'{{"w": [{"9" * 5000}]}}'),
    "a space that is a list": crafted({"d": D}, space='["w"]'),
    "an empty space": crafted({"d": D}, space="{}"),
    "a kind that is a list": crafted({"d": D}, operator=tree(kind=["diagonal"])),
    "a kind that is nothing": crafted({"d": D}, operator=tree(kind=None)),
    "an abstract kind": crafted({"d": D}, operator=tree(kind="")),
    "names that are numbers": crafted({"d": D}, operator=tree(names=[0])),
    "names that are one text": crafted({"d": D}, operator=tree(names="w")),
    "a tensor that is a number": crafted({"d": D}, operator=tree(tensors={"diagonal": 3})),
    "a tensor that is a list": crafted({"d": D}, operator=tree(tensors={"diagonal": ["d"]})),
    "parts that are a text": crafted({"d": D}, operator=tree(tensors={"diagonal": {"parts": "d", "rows": [5]}})),
    "parts beyond the end": crafted({"d": D}, operator=tree(tensors={"diagonal": {"parts": ["d"], "rows": [5]}})),
    "parts of parts": crafted({"d": D}, operator=tree(tensors={"diagonal": {"parts": [["d"]], "rows": [4]}})),
    "rows without a unit": crafted({"d": D}, operator=tree(kind="low_rank")),
    "rows without a scale": crafted({"d": D}, operator=tree(kind="low_rank", tensors={}, children=[TREE])),
    "children that are a number": crafted({"d": D}, operator=tree(children=3)),
    "children that are texts": crafted({"d": D}, operator=tree(children=["d"])),
    "a tree that is a text": crafted({"d": D}, operator='"diagonal"'),
    "recorded numbers": crafted({"d": D}, metadata="3"),
    "recorded not a number": crafted({"d": D}, metadata="NaN"),
    "no version": crafted({"d": D}, version=""),
    "version nought": crafted({"d": D}, version="0"),
    "version minus one": crafted({"d": D}, version="-1"),
    "checksums that are none": crafted({"d": D}, checksums="3", checksum="00000000"),
}  # fmt: skip


def opened(path: Path) -> FisherOperator:
    file = open_file(path)
    return file.read(file.space.names)


@pytest.mark.parametrize("name", MALICIOUS)
def test_load__refuses_a_malicious_header(name: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(of_header(MALICIOUS[name], b"\x00" * 16))
    with pytest.raises(FileFormatError, match=r"load\('.*f'\)"):
        load(tmp_path / "f")
    with pytest.raises(FileFormatError, match=r"open_file\('.*f'\)"):
        opened(tmp_path / "f")


def test_load__accepts_the_header_that_these_are_made_of(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(of_header(crafted({"d": D}), b"\x00" * 16))
    assert torch.equal(load(tmp_path / "f").diagonal(), torch.zeros(4))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", DEEP, '{"metadata": {}, "metadata": {}, "weight_map": {}}', '{"metadata": [], "weight_map": {}}',
     '{"metadata": {"format": "fisherkit", "save": 3}, "weight_map": {}}',
     '{"metadata": {"format": "fisherkit", "save": "a"}, "weight_map": {"d": 3}}',
     '{"metadata": {"format": "fisherkit", "save": "a"}, "weight_map": {"d": "a\\u0000b"}}',
     '{"metadata": {"format": "fisherkit", "save": "a"}, "weight_map": "d"}'],
)  # fmt: skip
def test_load__refuses_an_index_of_anything(text: str, tmp_path: Path) -> None:
    (tmp_path / "f.safetensors.index.json").write_text(text)
    for read in (load, opened):
        with pytest.raises(FileFormatError):
            read(tmp_path / "f.safetensors")


def test_save__that_fails_in_the_middle_leaves_the_whole_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diagonal(torch.float64, LAYER)[0].save(tmp_path / "f")
    before = (tmp_path / "f").read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        diagonal(torch.float64, LAYER, seed=3)[0].save(tmp_path / "f")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_bytes() == before
