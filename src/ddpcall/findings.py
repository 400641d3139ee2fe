"""The catalogue of findings: code, severity, why it matters, the line to write. Data, rendered; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

_DDP_SOURCE = "https://github.com/pytorch/pytorch/blob/main/torch/nn/parallel/distributed.py"
_DDP_DOCS = "https://docs.pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html"
_MODULE_DOCS = "https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html"
_FSDP_DOCS = "https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html"
_COMPILE_DOCS = "https://docs.pytorch.org/docs/stable/generated/torch.compile.html"
_ISSUE = "https://github.com/pytorch/pytorch/issues/"


class Severity(StrEnum):
    """How much harm: `error` trains another model, `warning` loses something, `note` is worth knowing."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"

    @property
    def rank(self) -> int:
        """Order: 0 for a note, 2 for an error."""
        return (Severity.NOTE, Severity.WARNING, Severity.ERROR).index(self)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One kind of finding.

    Attributes:
        code: DC and three digits: 1xx gradients, 2xx replicas, 3xx what a call loses on one rank,
            5xx how the run is set up.
        name: The code in words.
        severity: The usual severity; a finding may have a lower one.
        title: One line.
        why: What it does to the trained model.
        wrong: A line that raises it.
        fix: What to write instead.
        silent_when: The harmless look-alikes, on which it stays silent.
        blind_to: What it cannot see.
        links: Where the behaviour is documented, or was met.
    """

    code: str
    name: str
    severity: Severity
    title: str
    why: str
    wrong: str
    fix: str
    silent_when: str
    blind_to: str
    links: tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """A line: its file, its number from 1, the function it stands in."""

    file: str
    line: int
    function: str


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something wrong in a user's run.

    Attributes:
        code: The rule's code.
        name: The rule's name.
        severity: error, warning or note.
        message: What happened, with numbers.
        file: The user's file, or an installed library's; empty where no line can be told.
        line: From 1; 0 where no line can be told.
        function: The function the line stands in.
        ranks: The ranks on which it was seen.
        step: The first optimizer step (from 1) it was seen in.
        parameters: Parameters or buffers concerned, by name.
        cause: One word for the mechanism: the event's kind.
        fix: The line to write instead.
        count: How often it was seen on the rank that saw it most.
        called_from: The user's line that led to this one, where it is an installed library's or a hook's helper.
    """

    code: str
    name: str
    severity: str
    message: str
    file: str
    line: int
    function: str
    ranks: tuple[int, ...]
    step: int
    parameters: tuple[str, ...]
    cause: str
    fix: str
    count: int = 1
    called_from: Place | None = None


_RULES = (
    Rule(
        code="DC101",
        name="gradients-not-synchronized",
        severity=Severity.ERROR,
        title="The optimizer stepped with gradients that were never averaged over the ranks",
        why="DDP averages gradients only in a backward that follows a forward through the wrapper. Reached "
        "any other way, every rank trains a model of its own on its own share of the data; what is saved is "
        "rank 0's.",
        wrong="loss = ddp.module.compute_loss(batch)",
        fix="Call the wrapper: `loss = ddp(batch)`. To train through another method, let `forward` dispatch "
        "to it.",
        silent_when="Nothing flows back (no_grad, evaluation), the reducer was armed by a forward through the "
        "wrapper, "
        "the gradients are all-reduced by hand before the step, a later reduced backward covers them, they are "
        "dropped before the step, or there is one rank.",
        blind_to="DDP's python reducer and delayed all-reduce; updates made without a torch optimizer. What looks "
        "reduced by hand and is not, and gradients written by hand, are found when parameters differ. Where the "
        "script averages parameters instead (local SGD), the finding is taken back when it first does.",
        links=(_DDP_DOCS, _DDP_SOURCE, _ISSUE + "60921", _ISSUE + "14616"),
    ),
    Rule(
        code="DC102",
        name="parameter-outside-wrapper",
        severity=Severity.ERROR,
        title="A parameter is trained that no reducer owns",
        why="DDP's reducer is built once, from the parameters that require gradients when the model is "
        "wrapped. One that is unfrozen, added or replaced later is trained from rank-local gradients, and so is "
        "one that was never in a wrapped model: a loss's, a predictor's, a learned token.",
        wrong="ddp.module.head = nn.Linear(512, 10)",
        fix="Make the change first and wrap afterwards: `ddp = DistributedDataParallel(model)` again, and a new "
        "optimizer. Put modules that are trained together under one wrapper, or give each a wrapper.",
        silent_when="The parameter is in `_ddp_params_and_buffers_to_ignore`, its gradient is reduced by hand, or "
        "it is outside every wrapped module and differs between ranks from the start, or its gradients differ by "
        "rounding alone: those of a batch that every rank has gathered.",
        blind_to="Parameters outside every wrapped module whose optimizer steps twice for one backward of a "
        "wrapped model.",
        links=(_DDP_DOCS, _ISSUE + "12603"),
    ),
    Rule(
        code="DC103",
        name="wrapper-detached",
        severity=Severity.ERROR,
        title="A parameter's storage was replaced under the wrapper, and its gradients are no longer reduced",
        why="Changing dtype or device makes autograd create a new node for the parameter. The reducer's hook "
        "hangs on "
        "the old one, which no backward reaches any more.",
        wrong="ddp.module.double().float()",
        fix="Convert before wrapping, or convert a copy: `copy.deepcopy(ddp.module).to(...)`; otherwise wrap "
        "again.",
        silent_when="The model is not trained afterwards.",
        blind_to="`parameter.data = ...` by hand.",
        links=(_ISSUE + "104336",),
    ),
    Rule(
        code="DC104",
        name="sync-window-misplaced",
        severity=Severity.ERROR,
        title="`no_sync()` or `require_backward_grad_sync` stands around the wrong forward",
        why="DDP decides in `forward` whether the next backward is reduced. If the last forward before a step "
        "runs "
        "with synchronisation off, the step uses rank-local gradients. Around a backward alone, no_sync() does "
        "nothing (then it is a warning). `set_requires_gradient_sync(False)` is the same switch of replicate and "
        "fully_shard; a sharded model's step goes without the gradients.",
        wrong="with ddp.no_sync():  # around the last micro-batch too",
        fix="Put forward and backward of all micro-batches but the last inside `with ddp.no_sync():`, and the "
        "last "
        "outside, just before `optimizer.step()`.",
        silent_when="A reduced backward follows before the step, or the gradients are reduced by hand.",
        blind_to="FSDP1.",
        links=(_DDP_DOCS + "#torch.nn.parallel.DistributedDataParallel.no_sync",),
    ),
    Rule(
        code="DC105",
        name="stepped-before-reduction",
        severity=Severity.ERROR,
        title="The optimizer stepped inside the backward, before the gradients were reduced",
        why="A gradient hook runs when the local gradient has been accumulated. DDP reduces whole buckets, later. "
        "An optimizer that steps in the hook uses the local gradient.",
        wrong="parameter.register_post_accumulate_grad_hook(lambda p: optimizer.step())",
        fix="Step after `loss.backward()`, or use `torch.distributed.optim._apply_optimizer_in_backward`, "
        "which DDP "
        "knows of.",
        silent_when="One rank, or DDP's own optimizer-in-backward.",
        blind_to="Updates in the hook that do not go through a torch optimizer's step.",
        links=("https://docs.pytorch.org/tutorials/intermediate/optimizer_step_in_backward_tutorial.html",),
    ),
    Rule(
        code="DC106",
        name="averaged-in-groups",
        severity=Severity.ERROR,
        title="The ranks average gradients in groups that never meet",
        why="Each group trains a model of its own on its own share of the data, and what is saved is that of one "
        "group. Usual causes are a process group that does not span the world, and a hybrid mesh whose replicate "
        "dimension is missing.",
        wrong="ddp = DistributedDataParallel(model, process_group=group_of_this_host)",
        fix="Wrap with the group of all ranks: `DistributedDataParallel(model)`. For hybrid sharding give "
        "fully_shard the two-dimensional mesh, `(replicate, shard)`.",
        silent_when="The weights differ between the groups from the start (experts, tensor parallelism), or the "
        "script averages the weights afterwards.",
        blind_to="More than 64 ranks; steps that are not measured.",
        links=(_DDP_DOCS, _FSDP_DOCS),
    ),
    Rule(
        code="DC107",
        name="rank-left-out",
        severity=Severity.ERROR,
        title="What a rank computed is in nobody's gradient",
        why="The rank reads its share of the data and computes gradients, and no rank uses them: its data trains "
        "nothing.",
        wrong="dist.broadcast(p.grad, 0)  # instead of all_reduce",
        fix="Average over all ranks: `dist.all_reduce(p.grad)`, then `p.grad /= dist.get_world_size()`.",
        silent_when="The rank computed no gradient (uneven inputs), or it happened in one measured step alone.",
        blind_to="More than 64 ranks; steps that are not measured.",
        links=(_DDP_DOCS,),
    ),
    Rule(
        code="DC108",
        name="gradients-late",
        severity=Severity.WARNING,
        title="The last backward's gradient is not in the step that it was computed for",
        why="The optimizer steps with the gradients of earlier backwards; the last one's arrive a step later, or "
        "never. fully_shard with synchronization off on the last micro-batch does this.",
        wrong="model.set_requires_gradient_sync(False)  # on the last micro-batch too",
        fix="Switch synchronization on before the last micro-batch's backward: "
        "`model.set_requires_gradient_sync(True)`.",
        silent_when="It happened in one measured step alone.",
        blind_to="More than 64 ranks; steps that are not measured.",
        links=(_FSDP_DOCS,),
    ),
    Rule(
        code="DC109",
        name="optimizer-misses-parameters",
        severity=Severity.ERROR,
        title="Gradients are computed, and the optimizer uses none of them",
        why="The optimizer holds tensors that are not the model's parameters any more, or whose gradients are "
        "cleared before each step: its steps change nothing of the model, without a message.",
        wrong="model(example)  # after fully_shard, before the optimizer is made from gathered parameters",
        fix="Make the optimizer from the model that you train, after it was wrapped and before its first forward: "
        "`optimizer = torch.optim.AdamW(model.parameters())`. Call `zero_grad()` after `step()`, not before it.",
        silent_when="The optimizer uses the gradients in some step, or it happened in one measured step alone.",
        blind_to="More than 64 ranks; an optimizer whose tensors have other shapes than the model's parameters.",
        links=(_FSDP_DOCS, _ISSUE + "149205"),
    ),
    Rule(
        code="DC201",
        name="replicas-diverged",
        severity=Severity.ERROR,
        title="The ranks' parameters differ, and no event explains why",
        why="Data parallelism keeps one model on all ranks. From the step named on, there are several.",
        wrong="if rank == 0:\n    model.reset_parameters()",
        fix="Look at what the ranks did differently up to the step named; broadcast the parameters from rank 0.",
        silent_when="The parameters are excluded from DDP, differ only between optimizer steps (SAM), or are sent "
        "around by the script after each step (an optimizer sharded by hand); local SGD; the difference is "
        "one of rounding, or gone when the ranks are asked about it.",
        blind_to="Parameters outside every wrapped module; whatever comes after the script was seen to send them; "
        "one difference of a few roundings that does not grow.",
        links=(_DDP_DOCS,),
    ),
    Rule(
        code="DC202",
        name="loaded-on-some-ranks",
        severity=Severity.ERROR,
        title="`load_state_dict` ran on some ranks only, and the replicas differ",
        why="DDP broadcasts parameters when it wraps, not when a checkpoint is loaded afterwards.",
        wrong="if rank == 0:\n    ddp.module.load_state_dict(state)",
        fix="Load on every rank, or before wrapping.",
        silent_when="The model is broadcast afterwards.",
        blind_to="Parameters written by hand.",
        links=(_DDP_DOCS,),
    ),
    Rule(
        code="DC203",
        name="optimizer-differs",
        severity=Severity.ERROR,
        title="The optimizer's settings differ between ranks",
        why="Equal gradients with different learning rates give different models.",
        wrong="lr = base_lr * (1 + rank)",
        fix="Compute the settings from what all ranks share; step the scheduler on every rank.",
        silent_when="Parameters excluded from DDP; each optimizer has its share of them and the script sends the "
        "updates around.",
        blind_to="Optimizer state.",
        links=(_DDP_DOCS,),
    ),
    Rule(
        code="DC204",
        name="mode-differs",
        severity=Severity.ERROR,
        title="Some ranks train in eval mode",
        why="Gradients stay equal, but dropout and batch statistics do not: a rank that evaluated and did not "
        "switch back trains another function.",
        wrong="if rank == 0:\n    evaluate(model)  # calls model.eval() and never model.train()",
        fix="Call `model.train()` after evaluating, on every rank that called `model.eval()`.",
        silent_when="The modules concerned do not depend on the mode.",
        blind_to="Modes between two comparisons.",
        links=("https://github.com/huggingface/lerobot/pull/3668",),
    ),
    Rule(
        code="DC205",
        name="buffers-differ",
        severity=Severity.WARNING,
        title="Buffers differ between ranks when the model is evaluated or saved",
        why="BatchNorm statistics are local until the next training forward. Evaluating through the inner module "
        "gives every rank another result.",
        wrong="accuracy = evaluate(ddp.module)",
        fix="Broadcast the buffers first, or convert to SyncBatchNorm before wrapping.",
        silent_when="During training: DDP broadcasts buffers at the next forward. Rank 0 alone evaluates. A "
        "`state_dict` that is not saved, or that of a copy. Non-persistent buffers: caches and hidden states are "
        "a rank's own. Saving what differs is a note.",
        blind_to="Evaluation without a mode switch; evaluation on some ranks, but not on rank 0.",
        links=(_ISSUE + "13711", _ISSUE + "30718"),
    ),
    Rule(
        code="DC206",
        name="same-batch-on-every-rank",
        severity=Severity.WARNING,
        title="Every rank is fed the same batch",
        why="N ranks do the work of one.",
        wrong="loader = DataLoader(dataset, shuffle=True)  # same seed everywhere, no DistributedSampler",
        fix="Give the loader a `DistributedSampler(dataset)`, and call `sampler.set_epoch(epoch)`.",
        silent_when="The model is sharded over the ranks that share a batch; of several forwards in a step the "
        "first or the last has its own inputs.",
        blind_to="Batches that overlap in part.",
        links=("https://docs.pytorch.org/docs/stable/data.html#torch.utils.data.distributed.DistributedSampler",),
    ),
    Rule(
        code="DC207",
        name="identical-dropout",
        severity=Severity.NOTE,
        title="Every rank draws the same dropout masks",
        why="The same seed on every rank gives the same random numbers: less noise than meant.",
        wrong="torch.manual_seed(0)  # on every rank, after wrapping",
        fix="`torch.manual_seed(seed + rank)` after the model was built.",
        silent_when="The model has no active dropout.",
        blind_to="Generators passed by hand.",
        links=("https://github.com/huggingface/transformers/issues/31412",),
    ),
    Rule(
        code="DC208",
        name="loss-scale-differs",
        severity=Severity.ERROR,
        title="The GradScaler's loss scale differs between ranks",
        why="DDP averages the scaled gradients, and each rank divides the same average by its own scale: "
        "the ranks take steps of different sizes, and the replicas drift apart.",
        wrong='if rank == 0:\n    scaler.load_state_dict(checkpoint["scaler"])',
        fix="Call `scaler.load_state_dict(...)` on every rank, and give every rank the same `init_scale`.",
        silent_when="Gradients are unscaled before they are reduced, so that the parameters stay equal; each rank "
        "trains on its own until the script averages parameters (local SGD).",
        blind_to="A scale that is kept by hand; a GradScaler whose `step` and `unscale_` are never called.",
        links=("https://docs.pytorch.org/docs/stable/amp.html#gradient-scaling", _ISSUE + "136009"),
    ),
    Rule(
        code="DC301",
        name="hooks-skipped",
        severity=Severity.WARNING,
        title="A module with hooks was entered through `.forward`, and they did not run",
        why="Hooks are run by `__call__`, which calls `forward`.",
        wrong="outputs = model.forward(x)",
        fix="`outputs = model(x)`",
        silent_when="No hook is registered on the module.",
        blind_to="Calls through the class, `type(m).forward(m, x)`; hooks registered before the watch began.",
        links=(_MODULE_DOCS, _ISSUE + "117925"),
    ),
    Rule(
        code="DC302",
        name="compiled-code-bypassed",
        severity=Severity.WARNING,
        title="A compiled model was called on a path that runs eager",
        why="torch.compile compiles the call it returns; the original module, `_orig_mod` and other methods "
        "run eager.",
        wrong="compiled = torch.compile(model)\nloss = model(x)",
        fix="Call the compiled object; after `model.compile()`, `model(x)`; compile other methods themselves.",
        silent_when="Under no_grad, when the compiled object is used too.",
        blind_to="Eager parts after a graph break.",
        links=(_COMPILE_DOCS, _ISSUE + "141616", _ISSUE + "141473"),
    ),
    Rule(
        code="DC303",
        name="late-hook-ignored",
        severity=Severity.WARNING,
        title="A hook was registered after compilation and never fires",
        why="By default compiled code does not check for new hooks (`skip_nnmodule_hook_guards`).",
        wrong="compiled(x)\nmodel.layer.register_forward_hook(hook)",
        fix="Register hooks before the first compiled call, or call `torch.compiler.reset()` after.",
        silent_when="The hook fires.",
        blind_to="Backward hooks.",
        links=(_ISSUE + "117758",),
    ),
    Rule(
        code="DC304",
        name="precision-bypassed",
        severity=Severity.WARNING,
        title="Part of a mixed-precision model ran outside its autocast",
        why="accelerate puts autocast around the prepared model's forward alone; submodules and other methods "
        "called "
        "from outside run in full precision.",
        wrong="hidden = model.module.encoder(x)",
        fix="Call the prepared model, or put `with accelerator.autocast():` around the call.",
        silent_when="Under no_grad, or inside an autocast of your own.",
        blind_to="Other libraries' autocast.",
        links=("https://huggingface.co/docs/accelerate/package_reference/accelerator",),
    ),
    Rule(
        code="DC305",
        name="stale-weight",
        severity=Severity.ERROR,
        title="A weight that a hook recomputes was used without recomputing it",
        why="Legacy `weight_norm`, `spectral_norm` and `prune` compute the weight in a forward-pre hook, which "
        "`.forward(x)` skips: the optimizer moves parameters that the forward does not use.",
        wrong="outputs = layer.forward(x)  # layer = weight_norm(nn.Linear(4, 4))",
        fix="`outputs = layer(x)`, or `torch.nn.utils.parametrizations.weight_norm`, which needs no hook.",
        silent_when="The parametrization API is used.",
        blind_to="Hooks registered before the watch began.",
        links=(_ISSUE + "47588",),
    ),
    Rule(
        code="DC306",
        name="sharded-forward-bypassed",
        severity=Severity.ERROR,
        title="A sharded module was entered past the hooks that gather its parameters",
        why="fully_shard and parallelize_module work in forward hooks. `.forward` and other methods meet the "
        "shards: "
        '"got mixed torch.Tensor and DTensor". Where an earlier call left the parameters gathered they run, and '
        "the gradients never reach the shards: nothing is trained, silently.",
        wrong="loss = model.compute_loss(batch)",
        fix="`model(x)`, or `torch.distributed.fsdp.register_fsdp_forward_method(model, 'compute_loss')`.",
        silent_when="The same message without a bypass: its cause is another. A forward past the hooks whose "
        "gradients are reduced with those of a later call, before the step.",
        blind_to="FSDP1; weights of a sharded module used without any module's forward.",
        links=(_FSDP_DOCS, _ISSUE + "109385"),
    ),
    Rule(
        code="DC502",
        name="ranks-step-apart",
        severity=Severity.ERROR,
        title="Ranks took different numbers of optimizer steps, and ended with different parameters",
        why="A gradient is averaged over all ranks, but only some of them use it: each rank that skips a step by "
        "its own measure (its KL, its loss, its number of batches) keeps other parameters from there on.",
        wrong="if kl > 1.5 * target_kl:  # this rank's own KL\n    break",
        fix="Decide on what all ranks share: `dist.all_reduce(kl, op=dist.ReduceOp.AVG)` before the comparison.",
        silent_when="The parameters are equal at the end (`Join` broadcasts them); the script averages parameters "
        "(local SGD); a rank crashed, or took no step at all.",
        blind_to="Steps that all ranks skip equally often, but not the same ones; other optimizers than the first "
        "that stepped a wrapped model.",
        links=(
            "https://github.com/huggingface/trl/issues/254",
            "https://docs.pytorch.org/docs/stable/distributed.algorithms.join.html",
        ),
    ),
)

CATALOGUE: dict[str, Rule] = {rule.code: rule for rule in _RULES}


def find_rule(code: str) -> Rule:
    """Return a rule by code or name, in any case.

    Raises:
        ValueError: There is none such; the message lists them.
    """
    for rule in _RULES:
        if code.strip().lower() in (rule.code.lower(), rule.name):
            return rule
    raise ValueError(f"There is no finding {code!r}. There are: {', '.join(CATALOGUE)}.")


def render_page(rule: Rule) -> str:
    """Return a rule's page in Markdown."""
    links = "\n".join(f"* {link}" for link in rule.links)
    return f"""# {rule.code} {rule.name}

**{rule.severity}** · {rule.title}.

{rule.why}

```text
{rule.wrong}
```

**Write instead.** {rule.fix}

**Silent when.** {rule.silent_when}

**Blind to.** {rule.blind_to}

{links}
"""


def render_index() -> str:
    """Return the list of all rules in Markdown."""
    rows = "\n".join(
        f"| [{rule.code}]({rule.code}.md) | {rule.name} | {rule.severity} | {rule.title} |" for rule in _RULES
    )
    return f"""# Findings

Written by `python -m ddpcall explain --write docs/findings`; `ddpcall explain DC101` prints a page.

| code | name | severity | what |
| --- | --- | --- | --- |
{rows}
"""


def render_pages() -> dict[str, str]:
    """Return every page of docs/findings by file name."""
    return {"index.md": render_index(), **{f"{rule.code}.md": render_page(rule) for rule in _RULES}}
