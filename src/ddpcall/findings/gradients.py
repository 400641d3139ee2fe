"""DC1xx: whose gradients the optimizer used."""

from __future__ import annotations

from ddpcall.findings.finding import DDP_DOCS, DDP_SOURCE, FSDP_DOCS, ISSUE, Rule, Severity

RULES = (
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
        links=(DDP_DOCS, DDP_SOURCE, ISSUE + "60921", ISSUE + "14616"),
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
        links=(DDP_DOCS, ISSUE + "12603"),
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
        links=(ISSUE + "104336",),
    ),
    Rule(
        code="DC104",
        name="sync-window-misplaced",
        severity=Severity.ERROR,
        title="`no_sync()` or `require_backward_grad_sync` stands around the wrong forward",
        why="DDP decides in `forward` whether the next backward is reduced. If the last forward before a step "
        "runs "
        "with synchronization off, the step uses rank-local gradients. Around a backward alone, no_sync() does "
        "nothing (then it is a warning). `set_requires_gradient_sync(False)` is the same switch of replicate and "
        "fully_shard; a sharded model's step goes without the gradients.",
        wrong="with ddp.no_sync():  # around the last micro-batch too",
        fix="Put forward and backward of all micro-batches but the last inside `with ddp.no_sync():`, and the "
        "last "
        "outside, just before `optimizer.step()`.",
        silent_when="A reduced backward follows before the step, or the gradients are reduced by hand.",
        blind_to="FSDP1.",
        links=(DDP_DOCS + "#torch.nn.parallel.DistributedDataParallel.no_sync",),
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
        links=(DDP_DOCS, FSDP_DOCS),
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
        links=(DDP_DOCS,),
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
        links=(FSDP_DOCS,),
    ),
    Rule(
        code="DC109",
        name="optimizer-misses-parameters",
        severity=Severity.ERROR,
        title="Gradients are computed, and the optimizer uses none of them",
        why="The optimizer holds tensors that are not the model's parameters any more, or whose gradients are "
        "cleared before each step: its steps change nothing of the model, without a message.",
        wrong="optimizer = torch.optim.SGD(net.parameters(), lr=0.1)\nmodel = DDP(copy.deepcopy(net))",
        fix="Make the optimizer from the model that you train, after it was wrapped and before its first forward: "
        "`optimizer = torch.optim.AdamW(model.parameters())`. Call `zero_grad()` after `step()`, not before it.",
        silent_when="The optimizer uses the gradients in some step, or it happened in one measured step alone; a "
        "copy's values are put back within six steps.",
        blind_to="More than 64 ranks; an optimizer whose tensors have other shapes than the model's parameters: "
        "the answer says that no step used the model's gradients.",
        links=(FSDP_DOCS, ISSUE + "149205"),
    ),
    Rule(
        code="DC110",
        name="targets-weighted-unevenly",
        severity=Severity.NOTE,
        title="Ranks weigh the same though they have different numbers of targets",
        why="A loss that takes the mean over a rank's own targets divides by their number there, and averaged "
        "gradients weigh all ranks alike. A target on the rank that has few of them then counts for more: with 90 "
        "targets on one rank and 10 on the other, nine times as much as in one process with the whole batch.",
        wrong="loss = F.cross_entropy(logits, labels, ignore_index=-100)  # 90 targets here, 10 on the other rank",
        fix="Divide by all ranks' targets: `total = (labels != -100).sum(); dist.all_reduce(total)`, then "
        '`loss = F.cross_entropy(logits, labels, reduction="sum") * dist.get_world_size() / total`.',
        silent_when="The numbers differ by less than a tenth, or in half of the measured steps at most, as where "
        "the last batch of an epoch is uneven; the loss is multiplied by its own number of targets before the "
        "backward; the gradients are not averaged evenly; one line takes several means for a backward, as "
        "sequence by sequence.",
        blind_to="Numbers that differ between the micro-batches of one rank alone; class weights; losses in "
        "compiled code, and those that do not call `cross_entropy`, `nll_loss` or `binary_cross_entropy` of "
        "`torch.nn.functional`.",
        links=(
            "https://github.com/huggingface/transformers/issues/34242",
            "https://github.com/modelscope/ms-swift/issues/10165",
        ),
    ),
    Rule(
        code="DC111",
        name="clipped-before-averaging",
        severity=Severity.WARNING,
        title="Gradients are clipped while they are one rank's own, and averaged afterwards",
        why="Each rank scales its own gradient by a factor of its own, so the average favors the ranks with small "
        "gradients and points elsewhere than the gradient of the whole batch. In every micro-batch it also cuts "
        "what earlier ones have accumulated.",
        wrong="with ddp.no_sync():\n    loss.backward()\nclip_grad_norm_(ddp.parameters(), 1.0)",
        fix="Clip once a step, after the backward that averages (or after your own `all_reduce` of the gradients) "
        "and right before `optimizer.step()`: `torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)`.",
        silent_when="The clip changed nothing (its coefficient was 1), the gradients were averaged before it, or "
        "they are never averaged (local SGD) or were dropped after it (per-sample gradients); DTensors.",
        blind_to="Gradients clipped by hand.",
        links=(
            "https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html",
            "https://github.com/huggingface/accelerate/pull/641",
        ),
    ),
    Rule(
        code="DC112",
        name="norm-summed-over-ranks",
        severity=Severity.WARNING,
        title="The norm of averaged gradients is summed over the ranks, and they are clipped by it",
        why="After DDP's average every rank has the same gradient and the same norm. Squares summed over N "
        "ranks make the norm sqrt(N) times too large: gradients are clipped that much shorter, and the limit "
        "depends on the number of ranks.",
        wrong="dist.all_reduce(squared_norm)\n"
        "torch.nn.utils.clip_grads_with_norm_(ddp.parameters(), max_norm, squared_norm.sqrt())",
        fix="Leave the `all_reduce` out: `torch.nn.utils.clip_grad_norm_(ddp.parameters(), max_norm)` computes "
        "the norm of the averaged gradient on each rank. Only a sharded model's norm has to be summed.",
        silent_when="The norm is only logged, divided again, or reduced by another operation; sharded models.",
        blind_to="Other norms than the Euclidean; models without DDP; clipping by hand: what the "
        "step uses is the same as with a smaller limit and the right norm.",
        links=("https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grads_with_norm_.html",),
    ),
    Rule(
        code="DC113",
        name="gathered-without-gradient",
        severity=Severity.NOTE,
        title="A loss uses a gathered tensor, and no gradient flows back through the gather",
        why="`dist.all_gather`, accelerate's `gather` and Lightning's `all_gather` copy values. What a loss "
        "computes from the result "
        "reaches the other operand alone: of a contrastive loss over all ranks' samples each rank gets a part of "
        "the gradient, and the model is trained for another loss than one process with the whole batch has.",
        wrong="dist.all_gather(gathered, features)\nlogits = features @ torch.cat(gathered).T",
        fix="Gather with a gradient, `gathered = torch.distributed._functional_collectives.all_gather_single("
        "features, 0, dist.group.WORLD)` (`all_gather_tensor` before torch 2.13; Lightning: "
        "`all_gather(features, sync_grads=True)`). Putting this rank's own part back, "
        "`gathered[dist.get_rank()] = features`, gives a part of that gradient.",
        silent_when="The own part is put back; the tensor does not require grad, or is gathered under no_grad "
        "(queues, teachers, metrics); the result is detached, or reduced to fewer numbers; no backward goes "
        "through it.",
        blind_to="Compiled code; results that go through an autograd.Function; an own part that the loss masks "
        "out. Functional collectives have a gradient.",
        links=(
            "https://docs.pytorch.org/docs/stable/distributed.html#torch.distributed.all_gather",
            "https://github.com/KevinMusgrave/pytorch-metric-learning/issues/10",
        ),
    ),
)
