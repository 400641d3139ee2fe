"""A GAN with a wrapped generator and a bare discriminator, which steps first: one discriminator a rank.

Source: written for ddpcall, after GAN training scripts that prepare the generator alone.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def train_gan(generator, discriminator, num_steps):
    of_generator = torch.optim.SGD(generator.parameters(), lr=0.1)
    of_discriminator = torch.optim.SGD(discriminator.parameters(), lr=0.1)  # raises: DC102
    for _ in range(num_steps):
        fake = generator(torch.randn(4, 5))
        of_discriminator.zero_grad()
        (discriminator(fake.detach()) - 1).square().mean().backward()
        of_discriminator.step()  # or: DC102
        of_generator.zero_grad()
        discriminator(fake).square().mean().backward()
        of_generator.step()


def main():
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    generator, discriminator = DistributedDataParallel(nn.Linear(5, 3)), nn.Linear(3, 1)
    torch.manual_seed(int(os.environ["RANK"]))
    train_gan(generator, discriminator, 8)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
