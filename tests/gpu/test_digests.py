"""Digests of tensors on a GPU: computed there, sensitive to every bit, and no copy of the model."""

import pytest
import torch
from torch import nn

from ddpcall.replicas import CHUNK_BYTES, StateDigester, digest_on_device
from ddpcall.watch.compare.vitals import VitalsTaker

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")


@pytest.mark.parametrize("num_bytes", [1, 8, 1000, CHUNK_BYTES, 2 * CHUNK_BYTES + 12])
def test_a_gpu_computes_what_the_same_steps_give_on_the_cpu(num_bytes):
    data = torch.randint(256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert digest_on_device([data.cuda()]) == digest_on_device([data])


def test_single_bits_swaps_and_other_orders_show_on_a_gpu():
    tensors = {str(index): torch.randn(1001, device="cuda") for index in range(50)}
    state = StateDigester(tensors)
    seen = {state.digest()}
    assert state.digest() in seen
    tensors["7"].view(torch.int32)[500] ^= 1
    seen.add(state.digest())
    tensors["0"][3], tensors["49"][1000] = tensors["49"][1000].clone(), tensors["0"][3].clone()
    seen.add(state.digest())
    tensors["1"].copy_(tensors["1"].flip(0))
    seen.add(state.digest())
    assert len(seen) == 4


def test_no_copy_of_the_model_is_made():
    large = torch.zeros(2**28, dtype=torch.uint8, device="cuda")
    state = StateDigester({"large": large})
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    state.digest()
    assert torch.cuda.max_memory_allocated() - before < 6 * CHUNK_BYTES


def test_vitals_of_a_model_on_a_gpu_follow_its_state():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout()).cuda()
    taker = VitalsTaker(model, torch.optim.AdamW(model.parameters(), fused=True))
    batch = torch.randn(4, 8, device="cuda")
    before = taker.take(1, batch).parts
    assert before == taker.take(2, batch).parts
    model(batch)
    changed = {part for part, digest in taker.take(3, batch).parts.items() if digest != before[part]}
    assert changed == {"buffers", "rng"}
    batch[3, 7] += 1
    assert taker.take(4, batch).parts["batch"] != before["batch"]
