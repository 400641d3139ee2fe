"""`model.compile()` compiles the call; `generate` goes through `self.forward`.

Source: huggingface/transformers#34906 (1336 s became 1017 s when generate called the model).
Harm: generation runs eager, silently.
"""
# ranks: 1
# begins: 4

import torch
from torch import nn


class GenerationMixin:
    @torch.no_grad()
    def generate(self, input_ids, max_new_tokens):
        for _ in range(max_new_tokens):
            logits = self.forward(input_ids)  # raises: DC302
            input_ids = torch.cat([input_ids, logits[:, -1:].argmax(-1)], dim=1)
        return input_ids


class LlamaForCausalLM(nn.Module, GenerationMixin):
    def __init__(self, vocab=32, dim=16):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))
        self.lm_head = nn.Linear(dim, vocab)

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        return self.lm_head(hidden + self.mlp(hidden))


def main():
    torch.manual_seed(0)
    model = LlamaForCausalLM()
    model.compile(backend="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(4):
        ids = torch.randint(0, 32, (4, 8))
        logits = model(ids[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step} loss {loss.item():.4f}", flush=True)
    print(model.generate(ids[:1, :2], max_new_tokens=4).tolist(), flush=True)  # or: DC302


if __name__ == "__main__":
    main()
