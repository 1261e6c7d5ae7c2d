"""The example as a user runs it: real torchrun jobs, real SIGKILLs of the whole job, the same weights at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import corpus as corpora
import job as jobs
import pretrain
import pytest
import torch
from job import Job
from journal import Journal
from journal import read as read_journal
from ranks import run_ranks
from safetensors.torch import load_file

from sharded_adopt import checkpoint

EXAMPLES = Path(jobs.__file__).parent
PRETRAIN = EXAMPLES / "pretrain.py"
TINY = ["--layers", "1", "--heads", "2", "--width", "16", "--context", "16", "--batch", "6", "--warmup", "5"]


@pytest.fixture(autouse=True)
def one_thread_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums must not depend on the machine's cores: torchrun jobs and forked ranks are compared bit for bit."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def train(ranks: int, directory: Path, *arguments: str) -> None:
    """Run the example to its end under torchrun."""
    output = directory.with_suffix(".out")
    with output.open("w") as file, Job(ranks, PRETRAIN, [*TINY, *arguments, *into(directory)], output=file) as job:
        code = job.wait(240)
    assert code == 0, output.read_text()


def train_forked(ranks: int, directory: Path, *arguments: str) -> None:
    """Run the same to its end in forked ranks, where nothing is to be killed: it costs no start of Python."""
    run_ranks(ranks, _train_forked, [*TINY, *arguments, *into(directory)])


def _train_forked(rank: int, world_size: int, arguments: list[str]) -> None:
    pretrain.train(pretrain.parse_arguments(arguments), rank, world_size)


def train_until_killed(ranks: int, step: int, directory: Path, *arguments: str) -> None:
    """Start the example and SIGKILL all of it as soon as it has taken `step` updates."""
    output = directory.with_suffix(".killed")
    with output.open("w") as file, Job(ranks, PRETRAIN, [*TINY, *arguments, *into(directory)], output=file) as job:
        deadline = time.monotonic() + 240
        while max((line["step"] for line in read_journal(directory / "metrics.jsonl")), default=0) < step:
            assert job.running(), f"ended with {job.wait(0)} before it could be killed:\n{output.read_text()}"
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.005)
        assert job.running(), "ended before it could be killed"
        assert len(job.kill()) == ranks + 1


def into(directory: Path) -> list[str]:
    return ["--checkpoint-dir", str(directory)]


def summary(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "summary.json").read_text())


def newest_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All that the newest checkpoint holds: parameters, state and random numbers of every rank, by file and name."""
    newest = checkpoint.latest(directory)
    assert newest is not None
    return {
        f"{file.name}/{name}": tensor
        for file in sorted(Path(newest).glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def losses(directory: Path) -> list[float]:
    history = read_journal(directory / "metrics.jsonl")
    assert [line["step"] for line in history] == list(range(1, len(history) + 1))
    return [line["loss"] for line in history]


def figures(directory: Path) -> list[tuple[float, float]]:
    """What `optimizer.stats()` gave at each step, for an optimizer that has it."""
    history = read_journal(directory / "metrics.jsonl")
    return [(line["update_rms"], line["clipped_share"]) for line in history if "update_rms" in line]


@pytest.mark.parametrize(("optimizer", "kills"), [("adopt", [130, 350]), ("adamw", [230])])
def test_a_killed_and_resumed_run_ends_bit_equal_to_one_that_was_not(
    tmp_path: Path, optimizer: str, kills: list[int]
) -> None:
    """SIGKILLs of the whole job, after these steps; dropout is on, so that lost random numbers would show."""
    arguments = ["--steps", "700", "--save-every", "100", "--dropout", "0.2", "--optimizer", optimizer]
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    train_forked(2, calm, *arguments)
    for step in kills:
        train_until_killed(2, step, killed, *arguments)
    train(2, killed, *arguments)

    assert summary(calm)["resumed_from"] == 0
    assert kills[-1] - 100 < summary(killed)["resumed_from"] < 700
    assert summary(killed)["attempt"] == len(kills) + 1
    assert summary(killed)["weights_sha256"] == summary(calm)["weights_sha256"]
    calm_figures, killed_figures = figures(calm), figures(killed)
    assert calm_figures == killed_figures
    assert len(calm_figures) == (700 if optimizer == "adopt" else 0)
    assert all(update_rms > 0 and 0 <= share <= 1 for update_rms, share in calm_figures[1:])
    expected, got = newest_tensors(calm), newest_tensors(killed)
    # those that the example neither seeds nor uses
    names = [name for name in expected if not name.endswith(("rng/python", "rng/numpy"))]
    assert expected.keys() == got.keys()
    assert {name.partition("/")[2].partition("/")[0] for name in names} >= {"rng", "param", "exp_avg", "exp_avg_sq"}
    assert [name for name in names if not torch.equal(expected[name], got[name])] == []
    assert losses(killed) == losses(calm)
    lost = read_journal(killed / "metrics.lost.jsonl")
    assert {line["attempt"] for line in lost} == set(range(1, len(kills) + 1))


@pytest.mark.parametrize(("before", "after"), [(2, 3), (2, 1), (1, 2), (3, 4), (4, 2)])
def test_another_world_size_goes_on_with_the_same_batches(tmp_path: Path, before: int, after: int) -> None:
    """Without dropout the sums differ by rounding only, also where 7 rows do not divide evenly over the ranks."""
    for name, first, second in (("moved", before, after), ("whole", 1, 1)):
        for ranks, steps in ((first, 10), (second, 30)):
            train_forked(ranks, tmp_path / name, "--batch", "7", "--steps", str(steps))
    assert summary(tmp_path / "moved")["resumed_from"] == 10
    history = read_journal(tmp_path / "moved" / "metrics.jsonl")
    assert [line["world_size"] for line in history] == [before] * 10 + [after] * 20
    # losses are near 5; fp32 sums in another order differ by some 1e-7 of that, and ADOPT's first steps amplify them
    torch.testing.assert_close(losses(tmp_path / "moved"), losses(tmp_path / "whole"), rtol=0, atol=1e-4)


def test_more_ranks_than_rows_leave_some_ranks_without_a_batch(tmp_path: Path) -> None:
    train_forked(3, tmp_path / "three", "--steps", "6", "--batch", "2")
    train_forked(1, tmp_path / "one", "--steps", "6", "--batch", "2")
    torch.testing.assert_close(losses(tmp_path / "three"), losses(tmp_path / "one"), rtol=0, atol=1e-4)


def test_it_starts_without_torchrun_and_says_when_it_is_finished(tmp_path: Path) -> None:
    command = [sys.executable, str(PRETRAIN), *TINY, "--steps", "3", *into(tmp_path / "alone")]
    first = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "step 3/3" in first.stdout
    digest = summary(tmp_path / "alone")["weights_sha256"]
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "step 3/3" not in again.stdout
    assert summary(tmp_path / "alone")["resumed_from"] == 3
    assert summary(tmp_path / "alone")["weights_sha256"] == digest


def test_a_directory_of_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(os.urandom(1000))
    train_forked(1, tmp_path / "run", "--steps", "2")
    before = sorted((tmp_path / "run").rglob("*"))
    command = [sys.executable, str(PRETRAIN), *TINY, "--steps", "4", *into(tmp_path / "run")]
    other = subprocess.run(
        [*command, "--lr", "0.5", "--corpus", str(text)], capture_output=True, text=True, timeout=120, check=False
    )
    assert other.returncode != 0
    assert "lr 0.001" in other.stderr
    assert "this one has lr 0.5, corpus_sha256" in other.stderr
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_state_is_split_evenly_over_the_ranks(tmp_path: Path) -> None:
    train_forked(3, tmp_path / "run", "--steps", "2")
    whole, rank = (summary(tmp_path / "run")[f"state_nbytes_{which}"] for which in ("unsharded", "rank"))
    assert whole / 3 <= rank <= whole / 3 + 400  # one `step` (4 bytes) a parameter is kept by every rank


def test_batches_are_the_same_text_at_any_world_size() -> None:
    corpus = corpora.Corpus(torch.arange(251, dtype=torch.uint8), "", "")
    options = {"seed": 3, "step": 17, "size": 7, "context": 9}
    inputs, targets = corpus.batch(**options, rows=range(7))
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    for world_size in range(1, 10):
        parts = [corpora.rows_of_rank(7, rank, world_size) for rank in range(world_size)]
        assert [row for part in parts for row in part] == list(range(7))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        cut = torch.cat([corpus.batch(**options, rows=part)[0] for part in parts])
        assert torch.equal(cut, inputs)
    assert not torch.equal(corpus.batch(**{**options, "step": 18}, rows=range(7))[0], inputs)
    assert not torch.equal(corpus.batch(**{**options, "seed": 4}, rows=range(7))[0], inputs)


def test_the_corpus_is_the_files_in_order_and_must_fill_a_piece(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"first ")
    (tmp_path / "b").write_bytes(b"second")
    corpus = corpora.load([tmp_path / "a", tmp_path / "b"], context=5)
    assert bytes(corpus.text.tolist()) == b"first second"
    with pytest.raises(ValueError, match="longer than --context 12 bytes, got 12 bytes from a, b"):
        corpora.load([tmp_path / "a", tmp_path / "b"], context=12)


def test_every_python_carries_a_corpus() -> None:
    corpus = corpora.load([], context=128)
    assert len(corpus.text) > 1_000_000
    assert corpus.sha256 == corpora.load([], context=128).sha256


def test_a_journal_keeps_each_step_once_whatever_was_torn(tmp_path: Path) -> None:
    first = Journal(tmp_path, 0)
    for step in (1, 2, 3, 4):
        first.write(step=step, loss=float(step))
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # torn by the kill
    second = Journal(tmp_path, 2)
    second.write(step=3, loss=30.0)
    second.close()
    assert [(line["step"], line["loss"], line["attempt"]) for line in read_journal(tmp_path / "metrics.jsonl")] == [
        (1, 1.0, 1),
        (2, 2.0, 1),
        (3, 30.0, 2),
    ]
    lost = tmp_path / "metrics.lost.jsonl"
    assert [(line["step"], line["attempt"]) for line in read_journal(lost)] == [(3, 1), (4, 1)]
    # a kill before the second of the two renames: the lines are in both files
    (tmp_path / "metrics.jsonl").write_text((tmp_path / "metrics.jsonl").read_text() + lost.read_text())
    third = Journal(tmp_path, 3)
    third.close()
    assert third.attempt == 3
    assert [(line["step"], line["attempt"]) for line in read_journal(lost)] == [(3, 1), (4, 1)]


def test_the_demo_shows_the_kill_and_leaves_nothing_running(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--directory", str(tmp_path / "demo")]
    command += ["--steps", "300", "--save-every", "40", "--kill-after", "90", "--lr", "0.01", *TINY]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    killed = next(line for line in ran.stdout.splitlines() if "kill -9" in line)
    pids = [int(word) for word in killed.partition("kill -9 ")[2].partition(":")[0].split()]
    assert len(pids) == 3
    assert not any(jobs.alive(pid) for pid in pids)
    assert "ranks before / after" in ran.stdout
    picture = tmp_path / "demo" / "loss.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in ran.stdout


def test_the_demo_fails_when_its_job_does(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--directory", str(tmp_path / "demo"), "--optimizer", "none"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 1
    assert "the job ended with exit code 1 before step 115, nothing was killed" in ran.stderr


def test_the_demo_does_not_empty_a_directory_of_others(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all I have")
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--directory", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 2
    assert (tmp_path / "thesis.tex").read_text() == "all I have"
