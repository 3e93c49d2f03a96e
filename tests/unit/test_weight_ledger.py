"""The checksum of a sync: it sees every change of a tensor, on any memory, and costs about a copy."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
import torch

from actors.weight_transfer import ledger as ledger_module
from actors.weight_transfer.ledger import EngineRecord, Ledger, WeightSummary, WorkerRecord, tensor_checksum


@pytest.fixture(params=["host", "device"], autouse=True)
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs with what reads host memory, and with what a GPU does."""
    if request.param == "device":
        monkeypatch.setattr(ledger_module, "host_digest", ledger_module.device_digest)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 5), (1023,), (1024, 64), (517, 129), (9000, 33)])
def test_equal_tensors_have_equal_checksums_whatever_memory_they_are_in(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = noise(*shape, dtype=dtype)
    wanted = tensor_checksum("w", tensor)
    assert 0 <= wanted < 2**64
    assert tensor_checksum("w", tensor.clone()) == wanted
    assert tensor_checksum("w", torch.nn.Parameter(tensor, requires_grad=False)) == wanted
    # A tensor in the middle of a buffer, at a place that 8 does not divide.
    raw = tensor.reshape(-1).contiguous().view(torch.uint8)
    for shift in {tensor.element_size(), 8}:
        buffer = torch.zeros(shift + raw.numel() + 3, dtype=torch.uint8)
        buffer[shift : shift + raw.numel()] = raw
        assert tensor_checksum("w", buffer[shift : shift + raw.numel()].view(dtype).reshape(shape)) == wanted
    if tensor.dim() == 2:
        assert tensor_checksum("w", tensor.T.contiguous().T) == wanted, "its values count, not its strides"


def test_read_only_memory_is_read_only() -> None:
    array = np.arange(4096, dtype=np.uint8)
    wanted = tensor_checksum("w", torch.from_numpy(array.copy()))
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert tensor_checksum("w", torch.from_numpy(array)) == wanted


@pytest.mark.parametrize("num_bytes", [1, 8, 13, 8192, 8195, 300_001])
def test_every_bit_counts(num_bytes: int) -> None:
    data = noise(num_bytes).view(torch.uint8)[:num_bytes].clone()
    seen = {tensor_checksum("w", data)}
    places = range(num_bytes) if num_bytes < 20 else torch.randint(num_bytes, (40,)).tolist()
    places = dict.fromkeys([*places, num_bytes - 1])
    for place in places:
        for bit in range(8):
            data[place] ^= 1 << bit
            seen.add(tensor_checksum("w", data))
            data[place] ^= 1 << bit
    assert len(seen) == 1 + 8 * len(places)


def test_what_moves_or_changes_sign_in_pairs_is_seen() -> None:
    weight = noise(600, 576)
    changed = {"same": weight}
    changed["rows"] = weight[torch.tensor([1, 0, *range(2, 600)])]
    changed["far rows"] = weight[torch.tensor([599, *range(1, 599), 0])]
    changed["halves"] = torch.cat([weight[300:], weight[:300]])
    changed["columns"] = weight[:, torch.tensor([1, 0, *range(2, 576)])]
    changed["reversed"] = weight.flip(0)
    changed["negated"] = -weight
    changed["shifted"] = weight.reshape(-1).roll(1).reshape(600, 576)
    # The top bits of two 64-bit words, which cancel in a plain sum.
    changed["two signs"] = weight.clone()
    changed["two signs"][0, 1] *= -1
    changed["two signs"][0, 3] *= -1
    changed["two signs, apart"] = weight.clone()
    changed["two signs, apart"][0, 1] *= -1
    changed["two signs, apart"][599, 1] *= -1
    changed["zeros that change places"] = weight.clone()
    changed["zeros that change places"][5] = 0
    changed["other zeros"] = weight.clone()
    changed["other zeros"][6] = 0
    assert len({tensor_checksum("w", tensor) for tensor in changed.values()}) == len(changed)
    # Rows as long as those that are summed: the column sums stay as they are.
    aligned = noise(40, 2 * ledger_module.ROW_WORDS)
    assert tensor_checksum("w", aligned) != tensor_checksum("w", aligned[torch.tensor([1, 0, *range(2, 40)])])
    square = noise(512, 512)
    assert tensor_checksum("w", square) != tensor_checksum("w", square.T)


def test_name_type_and_shape_count() -> None:
    weight = torch.zeros(6, 4)
    others = [("w", weight), ("v", weight), ("w", weight.reshape(4, 6)), ("w", weight.to(torch.int32))]
    others += [("w", torch.zeros(6, 5)), ("w", torch.zeros(6, 8, dtype=torch.bfloat16))]
    assert len({tensor_checksum(name, tensor) for name, tensor in others}) == len(others)


def test_a_ledger_adds_up_in_any_order_but_not_across_names() -> None:
    named = {f"w{i}": noise(5, i + 1, seed=i) for i in range(6)}

    def summary(pairs: dict[str, torch.Tensor]) -> WeightSummary:
        ledger = Ledger()
        for name, tensor in ledger.record(pairs.items()):
            assert tensor is pairs[name]
        return ledger.summary

    whole = summary(named)
    assert (whole.num_tensors, whole.num_bytes) == (6, sum(tensor.nbytes for tensor in named.values()))
    assert whole.checksum == sum(tensor_checksum(*pair) for pair in named.items()) % 2**64
    assert summary(dict(reversed(named.items()))) == whole
    same_size = {"a": noise(3, seed=1), "b": noise(3, seed=2)}
    assert summary(same_size) != summary({"a": same_size["b"], "b": same_size["a"]})
    assert summary({}) == WeightSummary()


def test_a_tensor_that_comes_twice_is_refused() -> None:
    # vLLM counts elements, so one that comes twice hides one that never comes.
    ledger = Ledger()
    ledger.note("w", torch.zeros(3))
    with pytest.raises(ValueError, match="weight w came twice"):
        ledger.note("w", torch.ones(3))


def test_an_engines_record_joins_those_of_its_workers() -> None:
    one = WorkerRecord(WeightSummary(2, 8, 5), unloaded=("a", "b"))
    two = WorkerRecord(WeightSummary(2, 8, 6), unloaded=("b",), stale=("head",))
    record = EngineRecord.of(4, [one, two])
    assert record == EngineRecord(4, (one.received, two.received), ("a", "b"), ("head",))
    assert pickle.loads(pickle.dumps(record)) == record
