"""Only the classifier is trained; the prepared model is unwrapped for each batch, under a one-cycle schedule.

Source: kohya-ss/sd-scripts#604 ("forward/backward are called on the unwrapped modules"), in the shape of
accelerate's cv_example: frozen base with BatchNorm, gradients for the classifier alone.
Harm: the classifier's gradients stay local.
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset


class ResNet(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, classes)

    def get_classifier(self):
        return self.fc

    def forward(self, x):
        return self.fc(self.body(x).mean(dim=(2, 3)))


def main():
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(42)
    dataset = TensorDataset(torch.rand(80, 3, 12, 12), torch.randint(0, 4, (80,)))
    loader = DataLoader(dataset, batch_size=8, shuffle=True)
    model = ResNet()
    for param in model.parameters():
        param.requires_grad = False
    for param in model.get_classifier().parameters():
        param.requires_grad = True
    optimizer = torch.optim.Adam(params=model.parameters(), lr=1e-3)
    schedule = OneCycleLR(optimizer, max_lr=3e-2, epochs=1, steps_per_epoch=len(loader))
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    model.train()
    for step, (images, labels) in enumerate(loader):
        outputs = accelerator.unwrap_model(model)(images)  # raises: DC101
        loss = nn.functional.cross_entropy(outputs, labels)
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"rank {accelerator.process_index} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
