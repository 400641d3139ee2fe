import gc
import random
import weakref

import pytest
import torch

from ddpcall.replicas import (
    StateDigester,
    differs_between_ranks,
    digest_on_device,
    digest_state,
    digest_tensor,
    digest_tensors,
    gather_over_ranks,
    is_freed,
    is_unreadable,
)
from ddpcall.sketch import CannotSketch, sketch


def test_any_single_flipped_bit_changes_the_digest():
    tensor = torch.randn(64)
    clean = digest_tensor(tensor)
    seen = set()
    for bit in range(64 * 32):
        flipped = tensor.clone()
        flipped.view(torch.uint8)[bit // 8] ^= 1 << (bit % 8)
        seen.add(digest_tensor(flipped))
    assert clean not in seen
    assert len(seen) == 64 * 32


def test_the_digest_sees_the_order_of_elements():
    assert digest_tensor(torch.tensor([1.0, 2.0])) != digest_tensor(torch.tensor([2.0, 1.0]))


def test_the_digest_is_of_the_values_not_of_the_memory_layout():
    matrix = torch.arange(6.0).reshape(2, 3)
    assert digest_tensor(matrix.t().contiguous().t()) == digest_tensor(matrix)


def test_names_belong_to_the_digest_of_a_state():
    value = torch.ones(2)
    assert digest_state({"a": value}) != digest_state({"b": value})
    assert digest_state({"a": value}) == digest_state({"a": value.clone()})


def test_scalars_and_other_dtypes_have_digests():
    tensors = [torch.tensor(1), torch.ones(3, dtype=torch.bfloat16), torch.zeros(0), torch.tensor([True])]
    assert digest_tensors(tensors).shape == (4,)


def test_differences_are_found_per_element():
    gathered = torch.tensor([[1, 2, 3], [1, 9, 3]])
    assert differs_between_ranks(gathered).tolist() == [False, True, False]


def test_a_world_of_one_gathers_itself():
    assert gather_over_ranks(torch.tensor([1, 2]), None).tolist() == [[1, 2]]


DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.complex128,
]


def digest_chunks(tensors: list[torch.Tensor], chunk_bytes: int = 64) -> int:
    """Digest as on an accelerator, in chunks so small that these tensors span many."""
    return digest_on_device([tensor.reshape(-1).view(torch.uint8) for tensor in tensors], chunk_bytes)


def digest_stream(tensors: list[torch.Tensor]) -> int:
    return StateDigester({str(index): tensor for index, tensor in enumerate(tensors)}).digest()


BOTH_WAYS = pytest.mark.parametrize("digest", [digest_stream, digest_chunks])


def make_tensors(generator: random.Random) -> list[torch.Tensor]:
    """Tensors of odd sizes: words, chunks and tensors do not begin and end together."""
    sizes = [generator.randrange(1, 60) for _ in range(6)]
    seed = torch.Generator().manual_seed(generator.randrange(2**32))
    return [torch.randint(256, (size,), generator=seed, dtype=torch.uint8) for size in sizes]


@BOTH_WAYS
def test_a_flipped_bit_anywhere_changes_the_digest(digest):
    tensors = make_tensors(random.Random(0))
    clean = digest(tensors)
    seen = {clean}
    for tensor in tensors:
        for bit in range(8 * tensor.numel()):
            tensor[bit // 8] ^= 1 << bit % 8
            seen.add(digest(tensors))
            tensor[bit // 8] ^= 1 << bit % 8
    assert len(seen) == 1 + 8 * sum(tensor.numel() for tensor in tensors)
    assert digest(tensors) == clean


@BOTH_WAYS
@pytest.mark.parametrize("seed", range(20))
def test_swapped_elements_and_swapped_tensors_change_the_digest(digest, seed):
    generator = random.Random(seed)
    tensors = make_tensors(generator)
    clean = digest(tensors)
    for _ in range(50):
        first, second = generator.choice(tensors), generator.choice(tensors)
        i, j = generator.randrange(first.numel()), generator.randrange(second.numel())
        before = first[i].item(), second[j].item()
        first[i], second[j] = before[1], before[0]
        assert (digest(tensors) == clean) == (before[0] == before[1])
        first[i], second[j] = before
    i, j = sorted(generator.sample(range(len(tensors)), 2))
    swapped = [*tensors[:i], tensors[j], *tensors[i + 1 : j], tensors[i], *tensors[j + 1 :]]
    assert digest(swapped) != clean
    assert digest(tensors) == clean


@BOTH_WAYS
def test_swaps_of_powers_of_two_show_wherever_they_are(digest):
    """1.0 and 2.0 differ in few high bits; a sum weighted by position would lose them."""
    values = torch.tensor([2.0**exponent for exponent in range(-20, 20)])
    seen = {digest([values])}
    pairs = [(i, j) for i in range(len(values)) for j in range(i)]
    for i, j in pairs:
        swapped = values.clone()
        swapped[i], swapped[j] = values[j], values[i]
        seen.add(digest([swapped]))
    assert len(seen) == 1 + len(pairs)


@BOTH_WAYS
@pytest.mark.parametrize("value", [0, 1, 2, 255])
def test_constant_tensors_of_different_lengths_differ(digest, value):
    sizes = range(1, 300, 7)
    assert len({digest([torch.full((size,), value, dtype=torch.uint8)]) for size in sizes}) == len(sizes)


def test_where_one_tensor_ends_belongs_to_the_digest():
    tensor = torch.arange(10)
    assert digest_stream([tensor[:4], tensor[4:]]) != digest_stream([tensor[:5], tensor[5:]])


@pytest.mark.parametrize("change", ["name", "dtype", "shape", "order"])
def test_names_dtypes_shapes_and_order_belong_to_the_digest(change):
    one, two = torch.zeros(4, 2), torch.ones(4, 2)
    changed = {
        "name": {"a": one, "c": two},
        "dtype": {"a": one, "b": two.view(torch.int32)},
        "shape": {"a": one, "b": two.reshape(2, 4)},
        "order": {"b": two, "a": one},
    }[change]
    assert StateDigester(changed).digest() != StateDigester({"a": one, "b": two}).digest()
    assert (
        StateDigester({"a": one.clone(), "b": two.clone()}).digest()
        == StateDigester({"a": one, "b": two}).digest()
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_digested_bit_by_bit(dtype):
    tensor = torch.zeros(5, dtype=torch.uint8).to(dtype)
    state, alone = StateDigester({"a": tensor}), {digest_tensor(tensor)}
    together = {state.digest()}
    memory = tensor.view(torch.uint8)
    for index in range(memory.numel()):
        memory[index] = 1
        alone.add(digest_tensor(tensor))
        together.add(state.digest())
        memory[index] = 0
    assert len(alone) == len(together) == 1 + memory.numel()


SCATTERED = {
    "transposed": lambda: torch.randn(6, 4).t(),
    "channels_last": lambda: torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "sliced": lambda: torch.randn(6, 8)[:, ::2],
    "expanded": lambda: torch.randn(6, 1).expand(6, 4),
    "conjugated": lambda: torch.randn(6, dtype=torch.complex64).conj(),
    "negated": lambda: torch.randn(6, dtype=torch.complex64).conj().imag,
    "scalar": lambda: torch.randn(()),
    "offset": lambda: torch.randn(9)[3:],
}


@pytest.mark.parametrize("kind", SCATTERED)
def test_any_memory_layout_is_digested_by_its_values(kind):
    torch.manual_seed(0)
    tensor = SCATTERED[kind]()
    copy = tensor.clone(memory_format=torch.preserve_format)
    assert digest_tensor(tensor) == digest_tensor(copy) == digest_tensor(tensor.contiguous())
    state = StateDigester({"a": tensor})
    clean = state.digest()
    with torch.no_grad():
        tensor.view(-1)[0].add_(1) if tensor.is_contiguous() else tensor[(0,) * tensor.dim()].add_(1)
    assert state.digest() != clean
    assert digest_tensor(tensor) != digest_tensor(copy)


def test_tensors_larger_than_a_chunk_with_gaps_are_read_to_their_end():
    tensor = torch.zeros(5000, 1000)[:, :999]
    state = StateDigester({"a": tensor})
    clean = state.digest()
    tensor[-1, -1] = 1
    assert state.digest() != clean


def test_empty_lazy_meta_and_sparse_tensors_have_digests():
    tensors = {
        "empty": torch.zeros(0, 3),
        "lazy": torch.nn.LazyLinear(3).weight,
        "meta": torch.zeros(3, device="meta"),
        "sparse": torch.eye(3).to_sparse(),
    }
    state = StateDigester(tensors)
    assert state.digest() == state.digest() != StateDigester({}).digest()
    assert is_unreadable(tensors["lazy"])
    assert is_unreadable(tensors["meta"])
    assert is_unreadable(tensors["sparse"])
    assert not is_unreadable(tensors["empty"])
    assert digest_tensor(tensors["sparse"]) == 0


def test_a_lazy_parameter_is_seen_once_it_has_values():
    layer = torch.nn.LazyLinear(3)
    state = StateDigester(dict(layer.named_parameters()))
    before = state.digest()
    layer(torch.ones(1, 2))
    with_values = state.digest()
    with torch.no_grad():
        layer.bias[0] += 1
    assert len({before, with_values, state.digest()}) == 3


@pytest.mark.parametrize("kind", ["data", "half", "smaller", "freed"])
def test_memory_that_was_replaced_is_read_anew(kind):
    parameter = torch.nn.Parameter(torch.ones(64))
    state = StateDigester({"a": parameter})
    clean = state.digest()
    if kind == "data":
        parameter.data = torch.full((64,), 2.0)
    elif kind == "half":
        parameter.data = parameter.data.half()
    elif kind == "smaller":
        parameter.data = parameter.data[:63]
    else:
        parameter.untyped_storage().resize_(0)
    changed = state.digest()
    assert changed != clean
    assert changed == StateDigester({"a": parameter}).digest()
    if kind == "freed":
        parameter.untyped_storage().resize_(256)
        parameter.data.fill_(1)
    parameter.data = torch.ones(64)
    assert state.digest() == clean


@pytest.mark.parametrize("left", [0, 256, 384])
def test_a_view_into_freed_memory_is_not_read(left):
    """The address of a view is its offset where its storage is gone: reading it was a segmentation fault."""
    storage = torch.ones(1_000)
    first, second = storage[:32], storage[64:]
    state = StateDigester({"a": first, "b": second})
    clean = state.digest()
    storage.untyped_storage().resize_(left)
    assert is_freed(second)
    assert is_freed(first) == (left == 0)
    assert state.digest() != clean
    assert digest_tensor(second) == 0
    with pytest.raises(CannotSketch, match="freed"):
        sketch(second, "b")


def test_memory_that_came_back_smaller_is_not_read():
    parameter = torch.nn.Parameter(torch.ones(64))
    state = StateDigester({"a": parameter})
    state.digest()
    parameter.untyped_storage().resize_(0)
    parameter.untyped_storage().resize_(128)
    assert state.digest() == StateDigester({"a": parameter}).digest()
    assert is_freed(parameter)


def test_digested_tensors_can_still_be_resized_and_freed():
    """`Tensor.numpy` would forbid it, and FSDP frees its parameters so."""
    parameter, other = torch.nn.Parameter(torch.ones(64)), torch.ones(64)
    StateDigester({"a": parameter}).digest()
    digest_tensor(other)
    parameter.untyped_storage().resize_(0)
    other.resize_(2)
    assert parameter.untyped_storage().size() == 0


def test_a_digester_keeps_no_replaced_memory_alive():
    parameter = torch.nn.Parameter(torch.ones(64))
    storage = weakref.ref(parameter.untyped_storage())
    state = StateDigester({"a": parameter})
    parameter.data = torch.zeros(64)
    gc.collect()
    assert storage() is None
    assert state.digest() == StateDigester({"a": parameter}).digest()


def test_digesting_changes_nothing_and_copies_no_model():
    parameter = torch.nn.Parameter(torch.randn(2**20))
    state = StateDigester({"a": parameter})
    view = state._views[0]
    assert view.__array_interface__["data"][0] == parameter.data_ptr()
    version, before = parameter._version, parameter.detach().clone()
    state.digest()
    assert parameter._version == version
    assert parameter.requires_grad
    assert torch.equal(parameter, before)


def test_the_chunked_digest_does_not_depend_on_how_the_bytes_are_cut_into_tensors():
    data = torch.arange(500).to(torch.uint8)
    assert digest_on_device([data], 64) == digest_on_device(list(data.split(13)), 64)
    assert digest_on_device([data[1:]], 64) == digest_on_device([data[1:].clone()], 64)
    assert digest_on_device([data], 64) != digest_on_device([data[:-1]], 64)
