"""The lessons, in order. Data: what is asked, which experiment answers, and why it is so."""

from __future__ import annotations

from ddpcall.teach.lesson import Choice, Lesson, Question, compare_accuracy, compare_replicas, trains, verdict
from ddpcall.teach.mixing_lesson import MIXING
from ddpcall.teach.one_process_lesson import ONE_PROCESS
from ddpcall.teach.sources import Source

_MODULE = "torch.nn.modules.module"
_DDP = "torch.nn.parallel.distributed"

_SYNCED = Choice("synced", "averaged: equal on all ranks")
_LOCAL = Choice("local", "every rank keeps its own")
_CRASHED = Choice("crashed", "the step raises an error")
_FIRED = Choice("fired", "all of them fire")
_SKIPPED = Choice("skipped", "at least one kind does not")
_COMPILED = Choice("compiled", "compiled code runs")
_EAGER = Choice("eager", "it runs eager, silently")
_SAME = Choice("same", "the same on all ranks")
_DIFFER = Choice("differ", "different from rank to rank")


def _gradients(text: str, *more: Choice, **cell: str) -> Question:
    return Question(text, (_SYNCED, _LOCAL, *more), verdict("gradients", **cell))


def _hooks(text: str, role: str, **cell: str) -> Question:
    return Question(text, (_FIRED, _SKIPPED), verdict(f"hooks_{role}", **cell))


LESSONS = (
    Lesson(
        name="hooks_and_call",
        title="Hooks and `__call__`",
        experiment="hooks_bypass",
        question="What does `model(x)` do that `model.forward(x)` does not? One process, no wrapper, five models.",
        predict=(
            _hooks(
                "`model.forward(x)` on a plain MLP: do the hooks registered on `model` fire?",
                "wrapped",
                path="forward",
                model="Mlp",
            ),
            _hooks(
                "And the hooks registered on its layers?",
                "submodules",
                path="forward",
                model="Mlp",
            ),
            Question(
                "A linear layer with the legacy `weight_norm`, trained through `.forward(x)`: what happens?",
                (Choice("trains", "it trains"), Choice("crashed", "it raises an error")),
                trains(path="forward", model="weight_norm_linear"),
            ),
        ),
        columns=("hooks_wrapped", "hooks_submodules", "gradients", "accuracy"),
        look=(
            "`Mlp`: the loss, the gradients and the accuracy of both calls are the same. Only the hooks tell "
            "them apart.",
            "`spectral_norm_linear` by `forward`: nothing is raised, and the accuracy is that of chance.",
            "`gradients` says `no data parallelism` where it trains: one process has nobody to average with.",
        ),
        why=(
            "`nn.Module.__call__` is `_call_impl`: it runs forward-pre hooks, then `forward`, then forward "
            "hooks, and "
            "arranges for the full-backward hooks. `model.forward(x)` is the middle part alone, for this one "
            "module: "
            "`forward` calls the layers in the usual way, so their hooks fire.",
            "Whatever lives in a hook is lost with it. The legacy `spectral_norm`, `weight_norm` and `prune` "
            "recompute the weight in a forward-pre hook; without it the first weight is used for ever, and its "
            "autograd graph is gone in the second step. A lazy module learns its shape in one, too. Autograd, "
            "train and eval mode and parametrizations do not live in hooks, and are not lost.",
        ),
        sources=(
            Source(_MODULE, "Module._call_impl", "pre-hooks, forward, hooks, in this order"),
            Source(
                "torch.nn.utils.spectral_norm", "SpectralNorm.__call__", "the weight is set in a forward-pre hook"
            ),
        ),
        further=(
            ("ddpcall claims CF-1 CF-3 FM-2 FM-3", "what people say about `__call__`, on trial"),
            ("ddpcall train experiment=jit_hooks", "the same under TorchScript and export"),
        ),
        discuss=(
            "Why does PyTorch not simply raise an error in `forward` when it is called directly?",
            "Name three tools you use that hang on hooks. How would you notice that they have stopped working?",
        ),
    ),
    Lesson(
        name="who_synchronises",
        title="Who synchronises",
        experiment="forward_bypass",
        question="A model wrapped in DDP can be reached in many ways. Which of them average the gradients?",
        predict=(
            _gradients("`ddp(x)`: the gradients are …", path="call"),
            _gradients("`ddp.forward(x)`: the gradients are …", path="forward"),
            _gradients("`ddp.module(x)`: the gradients are …", path="inner_call"),
            _gradients(
                "`ddp.module.compute_loss(x, y)`, a method of your own: the gradients are …", path="inner_method"
            ),
        ),
        columns=("gradients", "hooks_wrapped", "hooks_inner", "accuracy", "distance"),
        look=(
            "`forward` is synchronised, although the wrapper's hooks are skipped. Synchronisation does not live "
            "in "
            "`__call__`.",
            "Everything that goes past the wrapper is `local`: each rank has trained a model of its own, and "
            "nothing "
            "was raised.",
            "The two accuracies in one row are those of the two ranks. Which of them would you have published?",
        ),
        why=(
            "`DDP.forward` runs `_pre_forward`, the module, `_post_forward`. The last one prepares the reducer: "
            "from "
            "then on it expects a gradient of every parameter, and all-reduces each bucket when it is full. "
            "This is "
            "why `ddp.forward(x)` synchronises just as `ddp(x)` does.",
            "`ddp.module` is the model you put in. It knows nothing of the wrapper: called directly, nobody "
            "prepares "
            "the reducer, and gradients stay where they were computed. The same holds for its methods, its layers "
            "and `functional_call`.",
        ),
        sources=(
            Source(_DDP, "DistributedDataParallel.forward", "pre, module, post"),
            Source(_DDP, "DistributedDataParallel._post_forward", "`reducer.prepare_for_backward`"),
        ),
        further=(
            ("ddpcall train experiment=replicate_bypass", "a wrapper for which the folk rule is true"),
            ("ddpcall lab start module_bypass", "mend a script that has this bug"),
        ),
        discuss=(
            "“Never call `forward`” is a rule of thumb. Which call does the harm here, and which does not?",
            "With one process all seven rows give the same numbers. How would you test for this bug on a laptop?",
        ),
    ),
    Lesson(
        name="arming",
        title="Arming and `no_sync`",
        experiment="arming",
        question="When exactly is it decided whether a backward synchronises?",
        predict=(
            _gradients(
                "`ddp(x)` first, its loss thrown away; then `ddp.module(x)` and its backward: the gradients are …",
                path="inner_call",
                window="wrapped_forward_first",
            ),
            _gradients(
                "The same, but the first `ddp(x)` ran under `no_grad`: the gradients are …",
                path="inner_call",
                window="wrapped_forward_no_grad_first",
            ),
            _gradients(
                "`ddp(x)` as usual, and `no_sync()` around the backward alone: the gradients are …",
                path="call",
                window="no_sync_backward",
            ),
            _gradients(
                "`no_sync()` around the forward alone: the gradients are …",
                path="call",
                window="no_sync_forward",
            ),
        ),
        columns=("gradients", "accuracy", "distance"),
        look=(
            "The row `inner_call, wrapped_forward_first` is synchronised: a bypass, saved by an earlier forward.",
            "`no_sync_backward` and `no_sync_forward` look alike in the code, and one of them does nothing.",
        ),
        why=(
            "The reducer is *armed* by a grad-enabled `DDP.forward` outside `no_sync()`, and stays so until a "
            "backward "
            "has used it up. Which module's loss that backward belongs to does not matter: gradients that "
            "arrive at "
            "an armed reducer are averaged.",
            "`no_sync()` sets the flag `require_backward_grad_sync`, and the flag is read in the forward. "
            "Around the "
            "backward it comes too late. Gradient accumulation therefore puts forward *and* backward inside.",
        ),
        sources=(
            Source(_DDP, "DistributedDataParallel.no_sync", "sets a flag, and nothing else"),
            Source(_DDP, "DistributedDataParallel._post_forward", "where the flag is read"),
        ),
        further=(
            ("ddpcall explain DC104", "how the watch tells a misplaced window"),
            ("ddpcall lab start no_sync_window", "mend an accumulation that is off by one"),
        ),
        discuss=(
            "Somebody fixes a bypass by calling `ddp(x)` once before it. Why does it work, and why is it a bad "
            "fix?",
            "What would break if the flag were read in the backward instead?",
        ),
    ),
    Lesson(
        name="replicas_parting",
        title="Replicas parting, and what it costs",
        experiment="replicas_parting",
        question="All ranks began with the same parameters. Without averaged gradients, what becomes of them, "
        "and who "
        "pays for it?",
        predict=(
            Question(
                "After 150 steps by `ddp.module(x)`, the ranks' parameters are …",
                (Choice("same", "the same on all ranks"), Choice("different", "different from rank to rank")),
                compare_replicas(path="inner_call", model="Mlp"),
            ),
            Question(
                "The MLP's test accuracy, on its worst rank: better by …",
                (
                    Choice("first", "`ddp(x)`"),
                    Choice("second", "`ddp.module(x)`"),
                    Choice("equal", "neither: within one percent"),
                ),
                compare_accuracy({"path": "call", "model": "Mlp"}, {"path": "inner_call", "model": "Mlp"}),
            ),
        ),
        columns=("gradients", "accuracy", "distance"),
        look=(
            "`distance` is how far a rank's parameters are from those of the synchronised run, relative to "
            "their norm.",
            "For the convolutional net one rank may be nearly as good as the synchronised model. A single "
            "accuracy on "
            "rank 0 shows nothing.",
        ),
        why=(
            "DDP sends rank 0's parameters to all ranks once, when it is built. From then on it keeps replicas "
            "alike "
            "by one means alone: equal gradients into equal optimizers. Nothing ever compares or repairs "
            "parameters, "
            "so one step with local gradients parts them for good.",
            "Each rank then learns from its own share of the data, with a batch that is smaller by the number of "
            "ranks, and what is saved is rank 0's. You have paid for N GPUs and trained on one N-th of the data.",
        ),
        sources=(
            Source(
                "torch.distributed.utils",
                "_sync_module_states",
                "rank 0's parameters, sent once by the constructor",
            ),
            Source(_DDP, "DistributedDataParallel._ddp_init_helper", "the reducer is built here, for good"),
        ),
        further=(
            ("ddpcall lab run replicas_parting --ranks 4", "the price grows with the ranks"),
            ("ddpcall train experiment=replicas_parting steps=600", "does it heal with time?"),
            ("ddpcall lab start load_on_rank0", "replicas that part before the first step"),
        ),
        discuss=(
            "Averaging the parameters at the end of the training: what would you get, and when is it a method?",
            "Which numbers would you log so that you see this within ten steps?",
        ),
    ),
    Lesson(
        name="batchnorm_dropout",
        title="BatchNorm and Dropout across ranks",
        experiment="batchnorm_dropout",
        question="Parameters are synchronised. What of running statistics, and of the random numbers that drop "
        "units?",
        predict=(
            Question(
                "`ddp(x)` in train mode: after the last step, BatchNorm's running statistics are …",
                (_SAME, _DIFFER),
                verdict("statistics", path="call", mode="train"),
            ),
            Question(
                "Evaluated then through `ddp(x)`, the same input gives outputs that are …",
                (_SAME, _DIFFER),
                verdict("evaluation_wrapped", path="call", mode="train"),
            ),
            Question(
                "All ranks called `torch.manual_seed(0)`. Their dropout masks are …",
                (Choice("identical", "the same positions on all ranks"), Choice("different", "each its own")),
                verdict("dropout", path="call", mode="train"),
            ),
            Question(
                "`ddp.module(x)` after `ddp.eval()`: dropout is …",
                (
                    Choice("none", "off, as eval mode asks"),
                    Choice("identical", "on: eval mode lives in `__call__`"),
                ),
                verdict("dropout", path="inner_call", mode="eval"),
            ),
        ),
        columns=("gradients", "dropout", "statistics", "evaluation_inner", "evaluation_wrapped"),
        look=(
            "`eval of inner` and `eval of wrapped` disagree on `call`: the same model, asked in two ways.",
            "`mode` train against seeded_by_rank: the masks are the same exactly where the seeds are.",
            "Modes hold on every path, also on those that skip hooks.",
        ),
        why=(
            "`training` is an attribute that BatchNorm and Dropout read inside their own `forward`. No hook and "
            "no "
            "`__call__` takes part, so modes hold however the model is reached.",
            "Running statistics are buffers, and each rank updates its own from its own batch. By default DDP "
            "sends "
            "rank 0's buffers to the others at the beginning of the *next* grad-enabled forward: after the last "
            "one "
            "they differ. Evaluation through the wrapper sends them once more; through `.module`, every rank "
            "evaluates with its own.",
            "Dropout draws from the rank's own generator. Equal seeds give equal masks, so N ranks drop as one: "
            "the "
            "noise is not averaged out. Seed by rank after the model is built.",
        ),
        sources=(
            Source("torch.nn.modules.batchnorm", "_BatchNorm.forward", "`self.training` is read here"),
            Source("torch.nn.modules.dropout", "Dropout.forward", "and here"),
            Source(_DDP, "DistributedDataParallel._sync_buffers", "rank 0's buffers, before a forward"),
        ),
        further=(
            ("ddpcall train experiment=batchnorm_modes", "buffers sent after the forward, or never"),
            ("ddpcall train experiment=sync_batchnorm", "statistics over all ranks (GPUs only)"),
            ("ddpcall lab start rank0_eval", "an evaluation that ruins the training"),
        ),
        discuss=(
            "You evaluate on rank 0 and save on rank 0. Do differing statistics matter?",
            "When would you want identical dropout masks on several ranks?",
        ),
    ),
    Lesson(
        name="compiled_code",
        title="Compiled code",
        experiment="compiled_calls",
        question="`torch.compile(m)` and `m.compile()` speed up some calls and leave others alone. Which?",
        predict=(
            Question(
                "After `m.compile()`, `m.forward(x)` runs …",
                (_COMPILED, _EAGER),
                verdict("compiled", wrapper="compile_inplace", path="forward", hooks="early"),
            ),
            Question(
                "After `c = torch.compile(m)`, `c.forward(x)` runs …",
                (_COMPILED, _EAGER),
                verdict("compiled", wrapper="compile", path="forward", hooks="early"),
            ),
            _hooks(
                "Hooks registered on layers after the first compiled call: do they fire in `c(x)`?",
                "submodules",
                wrapper="compile",
                path="call",
                hooks="late",
            ),
            _gradients(
                "`DDP(torch.compile(m))`, then `m(x)`: the gradients are …",
                wrapper="ddp_of_compile",
                path="inner_call",
            ),
        ),
        columns=("compiled", "gradients", "hooks_wrapped", "hooks_submodules"),
        look=(
            "`compile_inplace, forward` is eager. Nothing says so; it is only slower.",
            "`late` rows: hooks on layers are skipped wherever compiled code runs, and fire wherever it does not.",
        ),
        why=(
            "`torch.compile(m)` returns an `OptimizedModule` whose `forward` is the compiled one: its call and "
            "its "
            "forward both arrive there, the original `m` does not. `m.compile()` compiles `m`'s `_call_impl` and "
            "leaves `forward` as it is.",
            "Hooks on layers are traced into the graph. For speed, the guards that would notice a new one are "
            "left "
            "out (`skip_nnmodule_hook_guards`), so the graph is not traced again, and late hooks never fire.",
        ),
        sources=(
            Source("torch._dynamo.eval_frame", "OptimizedModule._initialize", "what is compiled"),
            Source(_MODULE, "Module.compile", "`_call_impl` alone"),
        ),
        further=(
            ("ddpcall train experiment=compile_bypass", "DDP inside and outside, 28 cells"),
            (
                "ddpcall train experiment=compiled_calls wrapper.compile_backend=inductor",
                "the same verdicts, slower",
            ),
        ),
        discuss=(
            "`generate()` of a compiled language model runs at eager speed. Where would you look first?",
            "A profiler attaches hooks to a model that is compiled already. What will its report be missing?",
        ),
    ),
    Lesson(
        name="sharding",
        title="Sharding: FSDP2 and tensor parallelism",
        experiment="sharded_calls",
        question="With FSDP2 a rank holds a piece of every parameter. Who puts the pieces together, and who "
        "does it when "
        "you call `forward`?",
        predict=(
            Question(
                "`fully_shard(m)`, then `m.forward(x)`: the step …",
                (Choice("sharded", "trains as usual"), _CRASHED, Choice("none", "runs, and trains nothing")),
                verdict("gradients", wrapper="fsdp2", path="forward", window="plain"),
            ),
            Question(
                "The same, after an earlier `m(x)` in the same step: the step …",
                (Choice("sharded", "trains as usual"), _CRASHED, Choice("none", "runs, and trains nothing")),
                verdict("gradients", wrapper="fsdp2", path="forward", window="wrapped_forward_first"),
            ),
            Question(
                "Tensor parallel layers (`parallelize_module`), then `m.forward(x)`: the step …",
                (Choice("sharded", "trains as usual"), _CRASHED),
                verdict("gradients", wrapper="tp", path="forward", window="plain"),
            ),
        ),
        columns=("gradients", "hooks_wrapped", "accuracy"),
        look=(
            "The crash is the good case. The row `none` ran to its end with the accuracy of an untrained model.",
            "`fsdp2_layers`: every layer is sharded by itself and the root owns nothing; `forward` works.",
        ),
        why=(
            "`fully_shard` gathers a module's parameters in a forward-pre hook of that module. `m.forward(x)` "
            "goes "
            "past the root's hook; what the root owns is still in pieces, and mixing them with plain tensors "
            "raises. "
            "Layers that were sharded themselves have hooks of their own, and are called in the usual way.",
            "After an earlier `m(x)` the root's parameters may still lie there whole. Then `forward` works on "
            "those, "
            "gradients end on tensors that no optimizer holds, and the step trains nothing, in silence.",
            "Tensor parallelism puts its hooks on the layers, so the root's `forward` does no harm; a layer's "
            "would.",
        ),
        sources=(
            Source("torch.distributed.fsdp._fully_shard._fsdp_state", "FSDPState._pre_forward", "the gathering"),
            Source(
                "torch.distributed.fsdp._fully_shard._fully_shard",
                "register_fsdp_forward_method",
                "the way to give other methods the same hooks",
            ),
            Source(
                "torch.distributed.tensor._api", "distribute_module", "tensor parallelism's hooks, on each layer"
            ),
        ),
        further=(
            ("ddpcall train experiment=sharded_bypass", "six kinds of sharding, layer by layer too"),
            ("ddpcall explain DC306", "how the watch tells this crash from others with the same message"),
        ),
        discuss=(
            "“It crashed” and “it did not crash”: why is neither a detector for a bypass here?",
            "A library calls `model.generate()` on a sharded model. What has to be done first, and by whom?",
        ),
    ),
    Lesson(
        name="accelerate_unwrap",
        title="accelerate, and what unwrapping takes away",
        experiment="accelerate_unwrap",
        question="`accelerator.prepare` adds DDP and bf16 autocast. `unwrap_model` gives the model back: "
        "without what?",
        predict=(
            _gradients(
                "Prepared in bf16; trained through `prepared.module(x)`: the gradients are …",
                wrapper="accelerate_bf16",
                path="inner_call",
            ),
            Question(
                "And its layers compute in …",
                (Choice("bfloat16", "bf16, as prepared"), Choice("float32", "fp32")),
                verdict("precision", wrapper="accelerate_bf16", path="inner_call"),
            ),
            Question(
                "`unwrap_model(prepared, keep_fp32_wrapper=False)`, once, say to save. From then on "
                "`prepared(x)` runs in …",
                (Choice("bfloat16", "bf16, as before"), Choice("float32", "fp32")),
                verdict("precision", wrapper="accelerate_stripped", path="call"),
            ),
        ),
        columns=("gradients", "precision", "accuracy"),
        look=(
            "Precision and synchronisation are lost separately: `inner_call` loses one, `submodules` both.",
            "`accelerate_stripped` by `call`: the wrapped model itself has changed, by a call that only asked "
            "for it.",
        ),
        why=(
            "`prepare_model` replaces `forward` on the model's instance by one that runs under autocast, and then "
            "wraps it in DDP. The inner module carries the patched forward with it: bf16 survives `.module`, "
            "averaging does not. Called layer by layer, not even autocast is entered.",
            "`unwrap_model(keep_fp32_wrapper=False)` takes the patch off the live model, for good. It is meant "
            "for "
            "models that will not be trained further.",
        ),
        sources=(
            Source("accelerate.accelerator", "Accelerator.prepare_model", "autocast on the instance, then DDP"),
            Source("accelerate.utils.other", "extract_model_from_parallel", "what unwrapping takes off"),
        ),
        further=(
            ("ddpcall train experiment=precision_bypass", "plain DDP with autocast beside it, 32 cells"),
            ("ddpcall lab start custom_method", "mend a trainer that unwraps"),
        ),
        discuss=(
            "A trainer unwraps to reach `compute_loss`. Write down two ways to have both the method and DDP.",
            "How would you notice that a run has been fp32 since step 1,000?",
        ),
    ),
    Lesson(
        name="one_rank_apart",
        title="One rank apart: what no collective sees",
        experiment="mode_mismatch",
        question="Rank 0 was left in eval mode after an evaluation. Every collective still succeeds. What shows "
        "it?",
        predict=(
            Question(
                "Rank 0 in eval mode, `ddp(x)` everywhere. Whoever compares the gradients of the ranks sees …",
                (Choice("synced", "nothing: they agree"), Choice("local", "that they differ")),
                verdict("gradients", path="call", mode="eval_on_rank_0"),
            ),
            Question(
                "Whoever compares the ranks' parameters after 12 steps sees …",
                (Choice("same", "nothing: they agree"), Choice("different", "that they differ")),
                compare_replicas(path="call", mode="eval_on_rank_0"),
            ),
            Question(
                "Whoever compares the modules' modes sees …",
                (Choice("train", "nothing: all train"), Choice("differs", "that the ranks differ")),
                verdict("modes", path="call", mode="eval_on_rank_0"),
            ),
        ),
        columns=("gradients", "modes", "dropout", "accuracy"),
        look=(
            "`eval_on_rank_0` by `call`: gradients `synced`, modes `differs`. Only a look at the flags tells.",
            "`no_grad` and `inference`: `gradients` is `none`. Whatever is averaged there, nothing is learnt.",
        ),
        why=(
            "The reducer averages what arrives. A gradient computed without dropout is a gradient; all ranks "
            "receive "
            "the same mean of unlike things, and the replicas stay equal. No comparison of parameters, "
            "gradients or "
            "collectives can see it.",
            "`model.eval()` sets a flag on every module of this process, and nobody sends flags anywhere.",
        ),
        sources=(Source(_MODULE, "Module.train", "a flag on each module, on this rank"),),
        further=(
            ("ddpcall explain DC204", "the watch compares modes"),
            ("ddpcall lab start rank0_eval", "mend it"),
        ),
        discuss=(
            "Which other settings of a rank travel with no collective? Make a list, and check it against DC203.",
        ),
    ),
    MIXING,
    ONE_PROCESS,
)


def find_lesson(name: str) -> Lesson:
    """Return a lesson by name or number, from 1.

    Raises:
        ValueError: There is none such; the message lists those that are.
    """
    for number, lesson in enumerate(LESSONS, 1):
        if name in (lesson.name, str(number)):
            return lesson
    names = ", ".join(lesson.name for lesson in LESSONS)
    raise ValueError(f"there is no lesson {name!r}; write a number from 1 to {len(LESSONS)}, or one of: {names}")


def number_of(lesson: Lesson) -> int:
    """Return a lesson's place in the course, from 1."""
    return LESSONS.index(lesson) + 1
