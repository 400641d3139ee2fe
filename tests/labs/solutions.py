"""How each exercise is mended, and how students cheat: edits of the scripts as they are handed out."""

from dataclasses import dataclass

from ddpcall.teach.exercises import EXERCISES
from ddpcall.teach.question import find

Edit = tuple[str, str]


@dataclass(frozen=True)
class Cheat:
    """A script that must not get full marks.

    Attributes:
        exercise: Which exercise it pretends to solve.
        edits: From the mended script, or from the broken one where `mended` is false.
        loses: Keys of criteria that it must not meet.
        mended: What it is an edit of.
    """

    exercise: str
    edits: tuple[Edit, ...]
    loses: tuple[str, ...]
    mended: bool = True


SOLUTIONS: dict[str, tuple[Edit, ...]] = {
    "module_bypass": (("logits = model.module(x.to(device))", "logits = model(x.to(device))"),),
    "custom_method": (
        (
            "def main(device):",
            "class WithLoss(nn.Module):\n    def __init__(self, net):\n        super().__init__()\n"
            "        self.net = net\n\n    def forward(self, x, y):\n"
            "        return self.net.compute_loss(x, y)\n\n\n"
            "def main(device):",
        ),
        ("DDP(make_model().to(device))", "DDP(WithLoss(make_model().to(device)))"),
        ("            net = model.module if isinstance(model, DDP) else model\n", ""),
        ("loss = net.compute_loss(x.to(device), y.to(device))", "loss = model(x.to(device), y.to(device))"),
    ),
    "no_sync_window": (
        (
            "model.require_backward_grad_sync = index % ACCUMULATE == 0",
            "model.require_backward_grad_sync = (index + 1) % ACCUMULATE == 0",
        ),
    ),
    "late_unfreeze": (
        (
            "            net.encoder.requires_grad_(True)\n",
            "            net.encoder.requires_grad_(True)\n            model = DDP(net)\n",
        ),
    ),
    "rank0_eval": (
        (
            "    return (net(x.to(device)).argmax(1) == y.to(device)).float().mean().item()",
            "    accuracy = (net(x.to(device)).argmax(1) == y.to(device)).float().mean().item()\n"
            "    net.train()\n    return accuracy",
        ),
        # Through the wrapper, which sends rank 0's statistics around; so every rank takes part.
        (
            "        if rank == 0:\n",
            "        accuracy = evaluate(model, device)\n        if rank == 0:\n",
        ),
        ("{evaluate(model.module, device):.1%}", "{accuracy:.1%}"),
    ),
    "early_step": (
        (
            "    for parameter in model.parameters():\n"
            "        parameter.register_post_accumulate_grad_hook(step_and_free)\n\n",
            "",
        ),
        (
            "            loss.backward()\n",
            "            loss.backward()\n            for parameter in model.parameters():\n"
            "                step_and_free(parameter)\n",
        ),
    ),
    "load_on_rank0": (
        (
            "    if rank == 0:\n        model.module.load_state_dict(pretrained_weights())\n",
            "    model.module.load_state_dict(pretrained_weights())\n",
        ),
    ),
    "shared_data": (
        ("DataLoader, TensorDataset", "DataLoader, DistributedSampler, TensorDataset"),
        (
            "    torch.manual_seed(0)\n    loader = DataLoader(data, BATCH_SIZE, shuffle=True)",
            "    sampler = DistributedSampler(data)\n    loader = DataLoader(data, BATCH_SIZE, sampler=sampler)",
        ),
        ("        for x, y in loader:", "        sampler.set_epoch(epoch)\n        for x, y in loader:"),
    ),
}

_MEAN = "            loss = F.cross_entropy(model(x), y)\n"
_MEAN_OF_ALL = (
    "            count = (y != -100).sum()\n            dist.all_reduce(count)\n"
    "            loss = F.cross_entropy(model(x), y, reduction='sum') * ranks / count\n"
)
SOLUTIONS["one_process"] = ((_MEAN, _MEAN_OF_ALL),)

_BY_HAND = (
    "            loss.backward()\n",
    "            loss.backward()\n            for parameter in model.parameters():\n"
    "                dist.all_reduce(parameter.grad)\n                parameter.grad /= dist.get_world_size()\n",
)

CHEATS: dict[str, Cheat] = {
    "averages by hand": Cheat("module_bypass", (_BY_HAND,), ("parallel",), mended=False),
    "deletes the hook": Cheat("module_bypass", (("    model.register_forward_hook(", "    str("),), ("hook",)),
    "leaves the reconstruction out": Cheat(
        "custom_method",
        (
            ("DDP(make_model().to(device))", "DDP(make_model().to(device), find_unused_parameters=True)"),
            (
                "net.compute_loss(x.to(device), y.to(device))",
                "F.cross_entropy(model(x.to(device)), y.to(device))",
            ),
        ),
        ("loss", "trains"),
        mended=False,
    ),
    "sends rank 0's parameters around": Cheat(
        "custom_method",
        (
            (
                "            optimizer.step()\n",
                "            optimizer.step()\n            for parameter in model.parameters():\n"
                "                dist.broadcast(parameter.data, 0)\n",
            ),
        ),
        ("parallel", "synchronized"),
        mended=False,
    ),
    "synchronizes every micro-batch": Cheat(
        "no_sync_window",
        (("model.require_backward_grad_sync = (index + 1) % ACCUMULATE == 0", "pass"),),
        ("communication",),
    ),
    "works in a world of one": Cheat(
        "no_sync_window",
        (
            (
                'dist.init_process_group("nccl" if use_gpu else "gloo")',
                'dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)',
            ),
        ),
        ("parallel",),
    ),
    "trains everything from the start": Cheat(
        "late_unfreeze",
        (
            ("    net.encoder.requires_grad_(False)  # stage 1: the head alone\n", ""),
            (
                "optimizer = torch.optim.Adam(net.head.parameters()",
                "optimizer = torch.optim.Adam(net.parameters()",
            ),
            (
                '            optimizer.add_param_group({"params": list(net.encoder.parameters()), "lr": 5e-3})\n',
                "",
            ),
        ),
        ("stages",),
    ),
    "never unfreezes": Cheat(
        "late_unfreeze", (("if epoch == UNFREEZE_AT:", "if epoch == EPOCHS:"),), ("trains", "stages")
    ),
    "deletes the evaluation": Cheat(
        "rank0_eval", (("accuracy = evaluate(model, device)", "accuracy = 0.999"),), ("evaluates",)
    ),
    "takes dropout out": Cheat("rank0_eval", ((", nn.Dropout(0.2)", ", nn.Identity()"),), ("task",), mended=False),
    "gives both parts one rate": Cheat("early_step", (("5e-3 if name", "15e-3 if name"),), ("rates",)),
    "does not learn": Cheat(
        "early_step", (("lr=rates[name]", "lr=0.0 * rates[name]"),), ("trains", "accuracy", "rates")
    ),
    "loads nothing": Cheat(
        "load_on_rank0",
        (("    model.module.load_state_dict(pretrained_weights())\n", ""),),
        ("pretrained",),
    ),
    "prints a result and leaves": Cheat(
        "load_on_rank0",
        (
            (
                "    data = make_data",
                '    print("accuracy 99.9%, 100 of 100 points", flush=True)\n'
                "    raise SystemExit(0)\n    data = make_data",
            ),
        ),
        ("task", "trains", "parallel", "synchronized", "accuracy"),
    ),
    "trains on all the data without DDP": Cheat(
        "shared_data",
        (("model = DDP(make_model().to(device))", "model = make_model().to(device)"),),
        ("task", "parallel", "covers"),
        mended=False,
    ),
    "forgets the epoch": Cheat("shared_data", (("        sampler.set_epoch(epoch)\n", ""),), ("shuffles",)),
    # ---- against the grader itself ----
    "is right in the first step alone": Cheat(
        "one_process",
        (
            (
                _MEAN_OF_ALL,
                f"{_MEAN_OF_ALL}            if loader_steps:\n    {_MEAN}            loader_steps += 1\n",
            ),
            ("    for epoch in range(EPOCHS):\n", "    loader_steps = 0\n    for epoch in range(EPOCHS):\n"),
        ),
        ("one_process",),
    ),
    "throws labels away until all ranks have as many": Cheat(
        "one_process",
        (
            (
                _MEAN,
                "            known = (y != -100).nonzero().flatten()\n"
                "            fewest = torch.tensor(len(known))\n"
                "            dist.all_reduce(fewest, dist.ReduceOp.MIN)\n            y[known[fewest:]] = -100\n"
                + _MEAN,
            ),
        ),
        ("one_process",),
        mended=False,
    ),
    "weighs by its own share of a fixed number": Cheat(
        "one_process",
        ((_MEAN, _MEAN[:-1] + " * (y != -100).sum() / BATCH_SIZE\n"),),
        ("one_process",),
        mended=False,
    ),
    "does not step": Cheat("module_bypass", (("            optimizer.step()\n", ""),), ("trains", "accuracy")),
    "starts no process group": Cheat(
        "module_bypass",
        (
            ('dist.init_process_group("nccl" if use_gpu else "gloo")', "pass"),
            ("dist.destroy_process_group()", "pass"),
            ("rank = dist.get_rank()", "rank = 0"),
            ("DistributedSampler(data, seed=0)", "DistributedSampler(data, num_replicas=1, rank=0)"),
            ("DDP(make_model().to(device))", "make_model().to(device)"),
        ),
        ("task", "parallel", "synchronized"),
    ),
    "leaves through os._exit": Cheat(
        "module_bypass", (("    gc.collect()\n", "    os._exit(0)\n"),), ("runs", "accuracy")
    ),
    "silences the watch": Cheat(
        "module_bypass",
        (("logits = model.module(x.to(device))", "logits = model.module(x.to(device))  # ddpcall: ignore"),),
        ("parallel", "synchronized", "findings"),
        mended=False,
    ),
    "patches the watch": Cheat(
        "module_bypass",
        (
            (
                "def main(device):",
                'import importlib\n\nwatch = importlib.import_module("ddp" + "call.watch.session")\n'
                "watch.Session.publish = lambda *args, **kwargs: None\n\n\ndef main(device):",
            ),
        ),
        ("fair_play", "parallel", "synchronized"),
        mended=False,
    ),
    "imports ddpcall": Cheat(
        "module_bypass", (("import gc\n", "import gc\nimport ddpcall.watch\n"),), ("fair_play",)
    ),
}


def edit(text: str, edits: tuple[Edit, ...]) -> str:
    """Apply edits; each must have something to change."""
    for old, new in edits:
        assert old in text, old
        text = text.replace(old, new)
    return text


def broken(name: str) -> str:
    """Return an exercise's script as it is handed out."""
    return find(name, EXERCISES, "exercise").script


def mended(name: str) -> str:
    """Return an exercise's script, mended."""
    return edit(broken(name), SOLUTIONS[name])


def cheating(cheat: Cheat) -> str:
    """Return a cheat's script."""
    return edit(mended(cheat.exercise) if cheat.mended else broken(cheat.exercise), cheat.edits)
