"""DC3xx: what a call loses on one rank."""

from __future__ import annotations

from ddpcall.findings.finding import COMPILE_DOCS, FSDP_DOCS, ISSUE, MODULE_DOCS, Rule, Severity

RULES = (
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
        links=(MODULE_DOCS, ISSUE + "117925"),
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
        links=(COMPILE_DOCS, ISSUE + "141616", ISSUE + "141473"),
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
        links=(ISSUE + "117758",),
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
        links=(ISSUE + "47588",),
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
        links=(FSDP_DOCS, ISSUE + "109385"),
    ),
    Rule(
        code="DC307",
        name="loaded-nothing",
        severity=Severity.ERROR,
        title="A state dict was loaded, and none of its names match but for a wrapper's prefix",
        why="A wrapper puts `module.` (torch.compile: `_orig_mod.`) before every name. `strict=False` passes over "
        "names that the model does not have, so a checkpoint of the wrapped model loads nothing into the plain "
        "one, nor the other way round: the run goes on from its initial weights.",
        wrong="ddp.load_state_dict(torch.load(path), strict=False)  # saved from ddp.module",
        fix="Save and load the module inside the wrapper, `ddp.module.load_state_dict(state)`, and leave "
        "`strict=False` out; of a state that has the prefix take it off with "
        '`torch.nn.modules.utils.consume_prefix_in_state_dict_if_present(state, "module.")`.',
        silent_when="Some names match; fewer than half would without the prefix (another model's state); a later "
        "load matches, or the values are put in by hand, before the next optimizer step; the values are equal "
        "already.",
        blind_to="Other lookups by name: an EMA, a freeze, an optimizer's group or a hook that is chosen by names "
        "and finds none leaves nothing that can be told from a script that wants none.",
        links=(MODULE_DOCS,),
    ),
)
