"""Every runner with a run folder, as one process of several would call it; and a check of them all.

`python tests/helpers/shared_runs.py --processes 4` runs them in one process and in four, kills one of the
four in the middle, deletes a third of the batches and runs in three, and compares every file byte
for byte.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import corelens as cl

TESTS = Path(__file__).parents[1]
RUNNERS = ("score", "evaluate", "ablation", "patch", "path", "rows")


def questions(n: int = 8) -> list[cl.Sample]:
    """Questions about small drawn scenes."""
    return cl.synthetic("refer", n=n, seed=1)


def run(model, runner: str, out: Path, samples: list[cl.Sample]) -> object:
    """Call one runner with a run folder."""
    heads = [(0, 1), (1, 2)]
    if runner == "score":
        return cl.score_heads(model, samples, ["ram", "lift"], batch_size=2, out=out)
    if runner == "evaluate":
        return cl.evaluate(model, samples, cl.knockout(heads), batch_size=2, out=out)
    if runner == "ablation":
        values = np.random.default_rng(0).random((model.cfg.n_layers, model.cfg.n_heads))
        scores = cl.HeadScores(values)
        return cl.ablation_sweep(
            model, samples, scores, (0.1, 0.5), "zero", draws=2, batch_size=2, out=out
        )
    clean = samples[:4]
    pair = clean, [cl.counterfactual(sample, "blur") for sample in clean]
    metric = cl.logit_diff(5, 7)
    if runner == "patch":
        return cl.activation_patch(model, *pair, metric=metric, out=out, batch_size=2)
    if runner == "path":
        receivers = ["blocks.1.attn.head.2.hook_q", "hook_logits"]
        options = {"per": ("sender", "receiver"), "metric": metric, "batch_size": 2}
        return cl.path_patch(model, *pair, heads, receivers, out=out, **options)
    if runner == "rows":
        return cl.where_read(model, samples, out=out)
    if runner == "study":
        options = {"draws": 2, "curve_draws": 1, "shares": (0.1,), "effect_samples": 0}
        return cl.study(model, {"refer": questions(12)}, out=out, findings=["F1", "F5"], **options)
    raise ValueError(runner)


def tiny_model():
    """The smallest model, the same in every process."""
    from helpers.families import tiny

    return cl.HookedMLLM(*tiny.__wrapped__("qwen3_vl"))


def launch(
    processes: int, model, out: Path, runners: tuple[str, ...] = RUNNERS, other: int = -1, pause: float = 0
) -> list:  # fmt: skip
    """Start processes that share these runs, each runner in a folder of its own under `out`.

    They are copies of this one (fork): imports and the model are there already.

    Args:
        other: the number of a process that sees other data.
        pause: seconds that every forward waits.
    """
    port, context = str(50_000 + os.getpid() % 10_000), multiprocessing.get_context("fork")

    def work(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_PORT": port}
        samples = questions()
        if rank == other:
            samples[3] = replace(samples[3], question="What is it?")
        if pause:
            model.hf.register_forward_pre_hook(lambda module, call: time.sleep(pause))
        try:
            for runner in runners:
                run(model, runner, out / runner, samples)
        except Exception as error:
            (out / f"error-{rank}").write_text(f"{type(error).__name__}: {error}")
            os._exit(1)

    out.mkdir(exist_ok=True)
    started = [context.Process(target=work, args=(rank,)) for rank in range(processes)]
    for process in started:
        process.start()
    return started


def finish(started: list) -> list[int]:
    """The exit code of each process."""
    for process in started:
        process.join()
    return [process.exitcode for process in started]


def files(folder: Path) -> dict[str, bytes]:
    """Every file of the run folders, but for locks, what a killed process had half written, and what
    each process keeps for itself."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*.*"))
        if file.is_file() and not file.name.startswith(".") and "work" not in file.parts
    }


def differing(several: Path, single: Path) -> list[str]:
    """The files that are not the same bytes in both."""
    a, b = files(several), files(single)
    return sorted(name for name in a | b if a.get(name) != b.get(name))


def alone(model, out: Path, runners: tuple[str, ...]) -> None:
    """The same runs in this process."""
    for runner in runners:
        run(model, runner, out / runner, questions())


def parts(folder: Path) -> int:
    """How many batches are finished."""
    return len(list(folder.rglob("*-0*.*")))


def check(processes: int, runners: tuple[str, ...], out: Path) -> None:
    """Compare one process with several, one of which is killed on the way; raises if a byte
    differs."""
    model, start = tiny_model(), time.time()
    alone(model, out / "one", runners)
    print(f"one process: {time.time() - start:.0f} s", flush=True)
    killed = launch(processes, model, out / "many", runners, pause=0.05)
    while parts(out / "many") < processes:
        time.sleep(0.02)
    os.kill(killed[-1].pid, signal.SIGKILL)
    codes = finish(killed)
    print(f"one of {processes} was killed; exit codes {codes}", flush=True)
    assert codes == [0] * (processes - 1) + [-signal.SIGKILL], codes
    assert not differing(out / "many", out / "one")
    print("the others finished its work, the same bytes", flush=True)
    for file in list((out / "many").rglob("*-0*.*"))[::3]:
        file.unlink()
    assert finish(launch(processes - 1, model, out / "many", runners)) == [0] * (processes - 1)
    assert not differing(out / "many", out / "one")
    print(f"a third of the batches again in {processes - 1}: {len(files(out / 'one'))} files equal")


def main() -> None:
    """The check of several processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runners", default=",".join(RUNNERS))
    parser.add_argument("--processes", type=int, default=4)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        check(asked.processes, tuple(asked.runners.split(",")), Path(folder))


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    main()
