import torch

from ddpcall.replicas import differs_between_ranks, digest_state, digest_tensor, digest_tensors, gather_over_ranks


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
