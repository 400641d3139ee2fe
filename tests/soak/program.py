"""A small training, right or wrong, with one fault of one or all ranks at one moment: its plan is its argument."""

import atexit
import gc
import json
import os
import shutil
import signal
import subprocess
import sys

plan = json.loads(sys.argv[1])
rank = int(os.environ.get("RANK", "0"))
STEPS = 6


def keep_what_was_written():
    """Keep what the findings file said before the fault: it must still say so at the end."""
    if os.path.isfile("f.json"):
        shutil.copyfile("f.json", f"before{rank}.json")


def stop_for_a_while(then):
    command = f"sleep 0.4; kill -{then} {os.getpid()}"
    subprocess.Popen(["sh", "-c", command], stdin=subprocess.DEVNULL, start_new_session=True)
    os.kill(os.getpid(), signal.SIGSTOP)


def fail():
    raise ValueError(f"the script's own error on rank {rank}")


def break_pipe(number):
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, number)


FAULTS = {
    "none": lambda: None,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segv": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "interrupt": lambda: os.kill(os.getpid(), signal.SIGINT),
    "pause": lambda: stop_for_a_while("CONT"),
    "stop_and_kill": lambda: stop_for_a_while("KILL"),
    "raise": fail,
    "exit_0": lambda: sys.exit(0),
    "exit_5": lambda: sys.exit(5),
    "exit_text": lambda: sys.exit("because of this"),
    "hard_0": lambda: os._exit(0),
    "hard_3": lambda: os._exit(3),
    "agent_gone": lambda: os.kill(os.getppid(), signal.SIGKILL),
    "stdout_gone": lambda: break_pipe(1),
    "stderr_gone": lambda: break_pipe(2),
    "stderr_full": lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), 2),
    "file_gone": lambda: os.path.exists("f.json") and os.unlink("f.json"),
    "other_directory": lambda: os.chdir("/"),
}


def at(moment):
    """Let the fault happen if this is its moment, and its rank."""
    if plan["moment"] == moment and plan["victim"] in (rank, "all"):
        keep_what_was_written()
        FAULTS[plan["fault"]]()


at("before torch")
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

at("before the group")
dist.init_process_group("gloo")
at("before the model")
torch.manual_seed(0)
inner = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
if plan["wrapper"] == "ddp":
    model = torch.nn.parallel.DistributedDataParallel(inner)
elif plan["wrapper"] == "replicate":
    from torch.distributed._composable.replicate import replicate

    model = replicate(inner)
else:
    model = inner
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
torch.manual_seed(rank)
at("before training")


def average(model):
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def is_wrong(step, mistake):
    return plan["mistake"] == mistake and step >= plan["from_step"]


for step in range(STEPS):
    at(f"step {step}: before forward")
    x = torch.randn(3, 4)
    call = inner.forward if is_wrong(step, "forward") else inner if is_wrong(step, "bypass") else model
    outputs = call(x)
    at(f"step {step}: after forward")
    if plan["moment"] == f"step {step}: in backward":
        outputs.register_hook(lambda gradient: at(plan["moment"]))
    optimizer.zero_grad()
    outputs.square().mean().backward()
    at(f"step {step}: after backward")
    if plan["wrapper"] == "hand" and not is_wrong(step, "not reduced"):
        average(model)
    if is_wrong(step, "other rate"):
        optimizer.param_groups[0]["lr"] = 0.1 + 0.1 * rank
    optimizer.step()
    at(f"step {step}: after the update")

del model, inner, optimizer, outputs
gc.collect()
at("before the end of the group")
dist.destroy_process_group()
at("at the end")
atexit.register(at, "in an exit handler")
print(f"rank {rank} came to its end")
