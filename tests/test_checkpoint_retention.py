"""Which checkpoints stay, and in which order they stand."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpointing import PlainOptimizer, Spec, manifest_of

from sharded_adopt import checkpoint
from sharded_adopt.checkpoint import Keep

SMALL = (Spec("weight", (5,)),)


def _save(root: Path, step: int, keep: Keep | None = None) -> Path:
    return checkpoint.save(root, step=step, optimizer=PlainOptimizer(SMALL, seed=step), keep=keep).path


def _steps(root: Path) -> list[int]:
    return [int(path.name[-12:]) for path in checkpoint.committed(root)]


def test_three_are_kept_unless_told_otherwise(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoint.save(tmp_path, step=step, optimizer=PlainOptimizer(SMALL))
    assert _steps(tmp_path) == [3, 4, 5]


def test_order_is_by_counter_so_a_step_taken_again_is_the_newest(tmp_path: Path) -> None:
    paths = [_save(tmp_path, step) for step in (100, 50, 100)]
    assert checkpoint.committed(tmp_path) == paths
    assert checkpoint.latest(tmp_path) == paths[-1]
    assert _steps(tmp_path) == [100, 50, 100]
    assert all(path.is_absolute() for path in paths)
    loaded = checkpoint.load(tmp_path, optimizer=PlainOptimizer(SMALL))
    assert loaded.path == paths[-1]


def test_relative_roots_give_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved = checkpoint.save("runs", step=1, optimizer=PlainOptimizer(SMALL))
    assert saved.path == tmp_path / "runs" / saved.path.name
    assert checkpoint.committed("runs") == [saved.path]


def test_each_checkpoint_names_its_parent_and_its_run(tmp_path: Path) -> None:
    manifests = [manifest_of(_save(tmp_path, step)) for step in (1, 2, 3)]
    digests = [checkpoint.verify(path) for path in checkpoint.committed(tmp_path)]
    assert [one.parent for one in manifests] == [None, (1, digests[0]), (2, digests[1])]
    assert len({one.run_id for one in manifests}) == 1
    assert manifests[0].run_id != manifest_of(_save(tmp_path / "other", 1)).run_id
    # A damaged parent is not one.
    (tmp_path / checkpoint.committed(tmp_path)[-1].name / "manifest.json").write_text("damaged")
    assert manifest_of(_save(tmp_path, 4)).parent == (2, digests[1])


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (Keep(last=1), [12]),
        (Keep(last=3), [9, 10, 12]),
        (Keep(last=1, every=4), [4, 8, 12]),
        (Keep(last=2, every=5), [5, 10, 12]),
        (Keep(last=99), [1, 4, 5, 8, 9, 10, 12]),
    ],
)
def test_prune_keeps_the_newest_and_every_nth_step(tmp_path: Path, keep: Keep, left: list[int]) -> None:
    steps = [1, 4, 5, 8, 9, 10, 12]
    paths = [_save(tmp_path, step) for step in steps]
    removed = checkpoint.prune(tmp_path, keep)
    assert _steps(tmp_path) == left
    assert removed == [path for path, step in zip(paths, steps, strict=True) if step not in left]
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in checkpoint.committed(tmp_path)]


def test_save_prunes_what_its_keep_does_not_ask_for(tmp_path: Path) -> None:
    for step in range(10):
        _save(tmp_path, step, Keep(last=2, every=3))
    assert _steps(tmp_path) == [0, 3, 6, 8, 9]


def test_a_checkpoint_that_cannot_be_deleted_does_not_fail_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import shutil

    _save(tmp_path, 1)

    def stuck(path: Path, *args: object, **kwargs: object) -> None:
        raise OSError(16, "Device or resource busy", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stuck)
        _save(tmp_path, 2, Keep(last=1))
        assert "cannot be deleted" in caplog.text
        _save(tmp_path, 3)
        with pytest.raises(checkpoint.CheckpointWriteError, match="could not be pruned"):
            checkpoint.prune(tmp_path, Keep(last=1))
    # It is out of sight at once, and gone after the next save.
    assert _steps(tmp_path) == [3]
    _save(tmp_path, 4)
    assert len(list(tmp_path.iterdir())) == 2


def test_wrong_rules_raise(tmp_path: Path) -> None:
    for last, every in ((0, None), (True, None), (1, 0), (2.0, None), (None, None), (1, "x")):
        with pytest.raises(ValueError, match="to be a whole number of at least 1"):
            Keep(last=last, every=every)  # type: ignore[arg-type]
    with pytest.raises(checkpoint.CheckpointNotFound):
        checkpoint.prune(tmp_path, Keep())
    with pytest.raises(TypeError, match=r"keep must be a checkpoint\.Keep, got int"):
        checkpoint.prune(tmp_path, 3)  # type: ignore[arg-type]
