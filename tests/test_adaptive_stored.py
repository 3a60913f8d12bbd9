"""A release in several storage formats is served from its stored tensors, with the bits of the restored network."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gearnn_ray import AdaptiveModel, Release, Store, UserError
from gearnn_ray.adaptors import storage_formats
from gearnn_ray.models.layers import same_bits
from gearnn_ray.serving.assembly import _by_format, _rows, _table
from gearnn_ray.serving.batch import CompressedTable, Mixture, Selection, Table
from gearnn_ray.serving.modules import AdaptiveConv
from tests.manifests import CLEAN, level_entry, manifest_of
from tests.nets import TRUST
from tests.test_adaptive_model import LEVELS, MIXED, SIZE, far, release_of, wanted

FORMATS = ("float32", "bfloat16", "int8", "int8")


def stored_variants(release: Release) -> Release:
    """Each level in another storage format, or in bfloat16 where that does not apply: most tables have rows of several."""
    base, stored = release.base_state(), {}
    for level in release.levels:
        changed = release.adaptor_state(level)
        storage_format = dict(zip(LEVELS, FORMATS, strict=True)).get(level, "float32")
        chosen = {
            name: storage_format if storage_formats.applies(storage_format, t.shape) else "bfloat16"
            for name, t in changed.items()
        }
        stored[level] = storage_formats.encode(base, changed, chosen)
    return Release(release.content, release.digest, base, stored)


def decoded(release: Release) -> Release:
    """The same levels as float32."""
    states = {level: release.adaptor_state(level) for level in release.levels}
    return Release(release.content, release.digest, release.base_state(), states)


def pair(release: Release, device: str = "cpu") -> tuple[AdaptiveModel, AdaptiveModel]:
    """Models of the release and of its float32 form, whose convolutions use the same methods."""
    ours, its = (AdaptiveModel(each, device, "interpolate", trust=TRUST) for each in (release, decoded(release)))
    convolutions = [[m for m in model._network.modules() if isinstance(m, AdaptiveConv)] for model in (ours, its)]
    for a, b in zip(*convolutions, strict=True):
        a.eager_method, a.compiled_method = b.eager_method, b.compiled_method
    return ours, its


def nbytes(*states: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for state in states for tensor in state.values())


def held(release: Release) -> int:
    return nbytes(release.base_state(), *map(release.stored_state, release.levels))


def restored_bytes(release: Release, level: str) -> int:
    """Bytes of the level's tensors in formats other than float32, once they are restored."""
    formats = storage_formats.formats_of(release.stored_state(level))
    return nbytes({n: t for n, t in release.adaptor_state(level).items() if formats[n] != "float32"})


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (7, 3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def release() -> Release:
    release = release_of("tests.nets:small")
    for state in (release.base_state(), *map(release.adaptor_state, LEVELS)):
        if "bn1.bias" in state:
            state["bn1.bias"][0] = -0.0  # a sum alone would lose the sign
    return stored_variants(release)


@pytest.fixture
def model(release: Release) -> AdaptiveModel:
    return AdaptiveModel(release, trust=TRUST)


# ── one table ────────────────────────────────────────────────────────────────────────────────────────────────────

shapes = st.sampled_from([(), (1,), (5,), (4, 6), (5, 1, 3, 3), (2, 3, 2)])
NUMBERS = torch.tensor([0.0, 0.0, -0.0, 1.0, -2.5, 0.3, 1e-3, 1e-38])


@settings(max_examples=80, deadline=None)
@given(st.data(), shapes, st.sampled_from(["w", "bn.running_var"]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_every_row_equals_decode(data: st.DataObject, shape: tuple[int, ...], name: str, own: torch.dtype) -> None:
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))

    def drawn() -> Tensor:
        return NUMBERS[torch.randint(len(NUMBERS), shape, generator=random)]

    base = {name: drawn().to(own)}
    stored = {}
    for level in LEVELS:
        storage_format = data.draw(
            st.sampled_from([storage_format for storage_format in FORMATS if storage_formats.applies(storage_format, shape)])
        )
        changed = {name: (base[name] + drawn()).to(own)} if data.draw(st.integers(0, 3)) else {}
        stored[level] = storage_formats.encode(base, changed, dict.fromkeys(changed, storage_format))
    levels = ("clean", *LEVELS)
    by_format = _by_format(name, {level: storage_formats.parts_of(state) for level, state in stored.items()})
    rows = _rows(by_format, levels)
    selection = Selection([rows], own == torch.float32, torch.device("cpu"))
    table = _table(name, base[name], by_format, 0, selection)
    want = torch.stack([storage_formats.decode(base, stored.get(level, {})).get(name, base[name]) for level in levels])

    formats = {storage_format for state in stored.values() for storage_format in storage_formats.formats_of(state).values()} - {
        "float32"
    }
    assert type(table) is (CompressedTable if formats else Table)
    assert nbytes({n: t for n, t in table.named_buffers() if "selection" not in n}) == nbytes(base, *stored.values())
    assert len(table) == 1 + sum(map(bool, stored.values()))
    for number, row in enumerate(rows):
        assert same_bits(table.row(row), want[number])
    order = data.draw(st.permutations(range(len(levels))))
    assert same_bits(table.take(torch.tensor(rows)[order]), want[order])
    if selection.mixes:
        weights = data.draw(st.lists(st.sampled_from([0.0, 0.25]), min_size=len(levels), max_size=len(levels)))
        selection.set_each([Mixture(i, *each) for i, each in enumerate(zip(order, weights, strict=True))])
        over = torch.tensor(weights).view(-1, *(1 for _ in shape))
        assert same_bits(table.gather(len(levels)), torch.lerp(want, want[order], over))


# ── a network ────────────────────────────────────────────────────────────────────────────────────────────────────


def check_bits(release: Release, images: Tensor, device: str = "cpu") -> None:
    """One level or several, set, given or between two levels: equal to the model of the float32 release."""
    ours, its = pair(release, device)
    for level in (*ours.levels, None):
        for model in (ours, its):
            model.set_level(level)
        levels = MIXED if level is None else [level] * 7
        want = its(images, levels)
        assert far(want.cpu(), wanted(release, images, levels)) < 1e-4
        for _ in range(2):  # if a level is set, the first run restores it and the second one uses what is held
            assert torch.equal(ours(images, None if level else levels), want)
            assert torch.equal(ours(images, levels), want)
        between = ["jpeg-15", *levels[1:]]
        assert torch.equal(ours(images, between), its(images, between))
        # as in a compiled graph, which has methods of its own
        answers = []
        for model in (ours, its):
            model._selection.set_index(torch.tensor([model.levels.index(q) for q in levels], device=device))
            with torch.no_grad():
                answers.append(model._outputs(model._predictor, images))
        assert torch.equal(*answers)


@pytest.mark.parametrize("network", ["tests.nets:small", "tests.zoo:twice", "tests.zoo:tied_names"])
def test_all_levels_have_the_bits_of_the_restored_network(network: str, images: Tensor) -> None:
    check_bits(stored_variants(release_of(network)), images)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_on_a_gpu(release: Release, images: Tensor) -> None:
    check_bits(release, images, "cuda")


@pytest.mark.usefixtures("no_recompile")
def test_one_graph_for_all_levels(release: Release, images: Tensor) -> None:
    model = AdaptiveModel(release, trust=TRUST)
    model.compile(backend="eager")
    sums = {rows.is_sum for table in model.modules() if isinstance(table, CompressedTable) for rows in table._groups()}
    assert sums == {True, False}
    for levels in (MIXED, MIXED[::-1], ["jpeg-50"] * 7):
        assert far(model(images, levels=levels), wanted(release, images, levels)) < 1e-5
    for level in model.levels:
        model.set_level(level)
        assert far(model(images), wanted(release, images, [level] * 7)) < 1e-5
    assert model.weight_bytes == held(release)  # a compiled graph holds nothing


# ── memory ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_adaptors_are_held_as_they_are_stored(release: Release, model: AdaptiveModel, images: Tensor) -> None:
    assert model.weight_bytes == held(release) < AdaptiveModel(decoded(release), trust=TRUST).weight_bytes
    tensors = {t.untyped_storage().data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    indices = sum(t.nbytes for t in model._selection.buffers())
    assert sum(t.untyped_storage().nbytes() for t in tensors.values()) == held(release) + indices
    for levels in (MIXED, ["jpeg-50"] * 7):
        model(images, levels=levels)
        assert model.weight_bytes == held(release)


def test_the_level_of_set_level_is_restored_once_and_held(
    release: Release, model: AdaptiveModel, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    restored = CompressedTable._restored

    def counted(table: CompressedTable, row: int) -> Tensor:
        calls.append(row)
        return restored(table, row)

    monkeypatch.setattr(CompressedTable, "_restored", counted)
    for level in ("jpeg-50", "jpeg-30", "jpeg-10", "clean"):
        model.set_level(level)
        assert model.weight_bytes == held(release)
        model(images)
        calls.clear()
        model(images)
        assert not calls
        assert model.weight_bytes == held(release) + restored_bytes(release, level)
    model.set_level("jpeg-50")
    model(images)
    model(images, levels=["jpeg-30"] * 7)  # in between: keeps nothing, and drops nothing
    model.set_level("jpeg-50")
    calls.clear()
    model(images)
    assert not calls
    assert model.weight_bytes == held(release) + restored_bytes(release, "jpeg-50")
    model.set_level(None)
    assert model.weight_bytes == held(release)


def test_shared_models_hold_one_copy(release: Release, model: AdaptiveModel, images: Tensor) -> None:
    model.set_level("jpeg-50")
    model(images)
    other = model.share()
    assert other.weight_bytes == held(release)
    other.set_level("jpeg-30")
    ours, its = (
        {t.untyped_storage().data_ptr() for t in [*m._network.parameters(), *m._network.buffers()]} for m in (model, other)
    )
    indices = {t.untyped_storage().data_ptr() for m in (model, other) for t in m._selection.buffers()}
    assert ours - indices == its - indices
    assert far(other(images), wanted(release, images, ["jpeg-30"] * 7)) < 1e-5
    assert far(model(images), wanted(release, images, ["jpeg-50"] * 7)) < 1e-5


def test_in_float32_tables_are_plain_and_no_tensor_is_copied() -> None:
    release = release_of("tests.nets:small")
    model = AdaptiveModel(release, trust=TRUST)
    assert {type(m) for m in model._network.modules() if isinstance(m, Table)} == {Table}
    for level in LEVELS:
        stored, state = release.stored_state(level), release.adaptor_state(level)
        assert stored.keys() == state.keys()
        assert all(stored[name] is tensor for name, tensor in state.items())


def test_from_a_store(tmp_path: Path, release: Release, images: Tensor) -> None:
    store = Store(tmp_path)
    base = store.put_state(release.base_state())
    levels: dict[str, dict[str, object]] = {}
    for level in release.levels:
        stored, state = release.stored_state(level), release.adaptor_state(level)
        blob = store.put_state(stored) if stored else None
        entry = CLEAN if blob is None else level_entry(blob, sum(t.numel() for t in state.values()), state)
        formats = storage_formats.formats_of(stored).items()
        levels[level] = {**entry, "storage_formats": {name: each for name, each in formats if each != "float32"}}
    network, classes = release.content.model.name, release.content.model.num_classes
    store.publish(manifest_of("made", network, classes, base, levels), {})
    pulled = store.pull("made")
    for level in release.levels:
        for ours, its in (
            (pulled.stored_state(level), release.stored_state(level)),
            (pulled.adaptor_state(level), release.adaptor_state(level)),
        ):
            assert ours.keys() == its.keys()
            assert all(same_bits(ours[name], its[name]) for name in its)
    assert AdaptiveModel(pulled, trust=TRUST).weight_bytes == held(release)

    # levels that share an adaptor: it is read and held once
    shared = {level: levels[LEVELS[0]] if level in LEVELS else entry for level, entry in levels.items()}
    store.publish(manifest_of("made", network, classes, base, shared), {})
    pulled = store.pull("made")
    alike = [pulled.stored_state(level) for level in LEVELS]
    assert all(tensor is alike[0][name] for state in alike for name, tensor in state.items())
    model_of_all = AdaptiveModel(pulled, trust=TRUST)
    assert model_of_all.weight_bytes == nbytes(release.base_state(), alike[0])
    answers = [model_of_all(images, [level] * len(images)) for level in (*LEVELS, "clean")]
    assert all(torch.equal(answers[0], answer) for answer in answers[1 : len(LEVELS)])
    assert not torch.equal(answers[0], answers[-1])
    with pytest.raises(UserError, match="no level 'jpeg-99'"):
        pulled.stored_state("jpeg-99")
