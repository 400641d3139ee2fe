"""Plain training in one process, no wrapper: `super().forward`, autograd.Function.forward, a parametrised
layer."""
# ranks: 1

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return grad * (s + x * s * (1 - s))


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return 0.5 * super().forward(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp = ScaledLinear(5, 15)
        self.mid = weight_norm(nn.Linear(15, 15))
        self.out = nn.Linear(15, 1)

    def forward(self, x):
        hidden = Swish.apply(self.inp(x))
        return self.out.forward(Swish.apply(self.mid.forward(hidden)))


def main():
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(5):
        x = torch.randn(16, 5)
        loss = nn.functional.mse_loss(model(x), x.prod(dim=1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
