"""Distillation: the student's decoder is pulled out of the wrapper, the teacher's rightly so.

Source: huggingface/trl#5282 (GKD and GOLD trainers with use_liger_gkd_loss).
Harm: the student trains on local gradients. The teacher is frozen and runs under no_grad: its unwrapped call is
fine.
"""

import gc
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class LM(nn.Module):
    def __init__(self, vocab, dim):
        super().__init__()
        self.decoder = nn.Sequential(nn.Embedding(vocab, dim), nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim))
        self.head = nn.Linear(dim, vocab, bias=False)

    def get_decoder(self):
        return self.decoder

    def forward(self, ids):
        return self.head(self.decoder(ids))


def jsd_loss(student_hidden, student_weight, teacher_hidden, teacher_weight, beta=0.5):
    student = F.log_softmax(student_hidden @ student_weight.T, dim=-1)
    teacher = F.log_softmax(teacher_hidden @ teacher_weight.T, dim=-1)
    mixture = torch.logsumexp(torch.stack([student, teacher]) + torch.tensor(beta).log(), dim=0)
    kl_teacher = F.kl_div(mixture, teacher, log_target=True, reduction="batchmean")
    kl_student = F.kl_div(mixture, student, log_target=True, reduction="batchmean")
    return beta * kl_teacher + (1 - beta) * kl_student


def compute_loss(model, teacher, ids):
    unwrapped_student = model.module
    base_student = unwrapped_student.get_decoder()
    student_hidden = base_student(ids)  # raises: DC101
    with torch.no_grad():
        teacher_hidden = teacher.get_decoder()(ids)
    return jsd_loss(student_hidden, unwrapped_student.head.weight, teacher_hidden, teacher.head.weight)


def main():
    rank = dist.get_rank()
    torch.manual_seed(0)
    teacher = LM(48, 32).eval().requires_grad_(False)
    model = DDP(LM(48, 16))
    torch.manual_seed(100 + rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(5):
        loss = compute_loss(model, teacher, torch.randint(0, 48, (4, 12)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        print(f"rank {os.environ['RANK']} step {step} jsd {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
