"""Reading a checkpoint back: all ranks the same one, verified first, and only then anything is changed."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sharded_adopt.checkpoint import errors
from sharded_adopt.checkpoint.contents import Checkpointable, model_rest
from sharded_adopt.checkpoint.errors import CheckpointCorrupt, CheckpointError
from sharded_adopt.checkpoint.fit import Fit, compare
from sharded_adopt.checkpoint.manifest import Manifest, parse_manifest
from sharded_adopt.checkpoint.root import absolute
from sharded_adopt.checkpoint.single import Candidate, find_candidates, read_checked
from sharded_adopt.checkpoint.staging import Staged, stage
from sharded_adopt.checkpoint.together import Failure, collectives_for, on_all, on_first, outcomes
from sharded_adopt.sharding.collectives import Collectives

if TYPE_CHECKING:
    import torch.distributed

logger = logging.getLogger("sharded_adopt.checkpoint")


@dataclass(frozen=True, slots=True)
class Loaded:
    """What has been loaded.

    `skipped`: for each newer checkpoint that was passed over, its name and what is wrong with it. `resharded_from`: the
    world size that wrote it, if it is not the present one (random number states are then left alone). `missing` and
    `unexpected`: with `strict=False`, the names that only the optimizer or model, or only the checkpoint, holds.
    """

    step: int
    extra: Any
    path: Path
    skipped: list[str]
    resharded_from: int | None
    missing: list[str]
    unexpected: list[str]


def load(
    root: str | os.PathLike[str],
    *,
    optimizer: Checkpointable,
    model: nn.Module | None = None,
    strict: bool = True,
    fallback: bool = True,
    expect_digest: str | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
) -> Loaded:
    """Load the newest good checkpoint in `root`, whatever world size wrote it. Collective.

    `root` may also be one checkpoint's own directory. Every rank reads and checks its part into memory of its own; only
    when all have succeeded is anything written to the optimizer, the model and the random number generators. Where the
    newest one is damaged on any rank, all go to the one before it together and log why (`fallback=False`: they raise).

    `strict=False` loads the names that both sides have. `expect_digest` asks for the checkpoint with that digest and
    never falls back. Parameters keep their place in memory.

    Raises on every rank, with nothing changed: `CheckpointNotFound` where there is none; `CheckpointCorrupt` where none
    is good; `CheckpointMismatch`, which lists every name, where the newest good one does not fit; `CheckpointError`
    where the file system fails.
    """
    with collectives_for(optimizer.collectives, process_group) as group:
        loading = _Loading(group, absolute(root), optimizer, model, strict, expect_digest)
        candidates = [Candidate(name) for name in on_first(group, loading.find, _same_error)]
        skipped: list[str] = []
        for candidate in reversed(candidates):
            problem, loaded = loading.attempt(candidate, skipped)
            if loaded is not None:
                return loaded
            skipped.append(f"{candidate.path(loading.root).name}: {problem}")
            if not fallback or expect_digest is not None:
                break
            if group.rank == 0:
                logger.warning("skipped %s", skipped[-1])
        raise CheckpointCorrupt(f"nothing was loaded from {root}: {'; '.join(skipped)}")


class _Loading:
    """One load on one rank."""

    def __init__(
        self,
        group: Collectives,
        root: Path,
        optimizer: Checkpointable,
        model: nn.Module | None,
        strict: bool,
        expect_digest: str | None,
    ) -> None:
        self._group = group
        self.root = root
        self._optimizer = optimizer
        self._model = model
        self._strict = strict
        self._expect_digest = expect_digest

    def find(self) -> list[str | None]:
        """Rank 0: the names of the checkpoints to try, oldest first."""
        return [candidate.name for candidate in find_candidates(self.root)]

    def attempt(self, candidate: Candidate, skipped: list[str]) -> tuple[str, Loaded | None]:
        """Load `candidate`, or say what is wrong with it. Raises `CheckpointMismatch` where it is good and not ours."""
        group, path = self._group, candidate.path(self.root)
        held: list[bytes] = []
        _, failures, error = outcomes(group, lambda: held.append(self._pick(candidate)) if group.rank == 0 else None)
        if failures:
            return _problem(failures, error), None
        manifest = parse_manifest(group.broadcast_bytes(held[0] if held else b""))
        fits: list[Fit] = []
        for lists in on_all(group, lambda: self._compare(manifest, fits), _same_error):
            Fit(*lists).require(self._strict)
        staged: list[Staged] = []
        _, failures, error = outcomes(group, lambda: staged.append(self._stage(path, manifest)))
        if failures:
            return _problem(failures, error), None
        self._apply(manifest, fits[0], staged[0])
        loaded = Loaded(
            step=manifest.step,
            extra=manifest.extra,
            path=path,
            skipped=list(skipped),
            resharded_from=None if manifest.world_size == group.world_size else manifest.world_size,
            missing=fits[0].missing,
            unexpected=fits[0].unexpected,
        )
        return "", loaded

    def _pick(self, candidate: Candidate) -> bytes:
        """Rank 0: the manifest, if it is good and its files are all there."""
        data, _ = read_checked(candidate.path(self.root), self._expect_digest)
        return data

    def _compare(self, manifest: Manifest, fits: list[Fit]) -> list[list[str]]:
        fit = compare(manifest, self._optimizer, self._model, self._optimizer.local_shards())
        fits.append(fit)
        return [fit.missing, fit.unexpected, fit.misshapen, fit.of_model]

    def _stage(self, path: Path, manifest: Manifest) -> Staged:
        optimizer, layout = self._optimizer, self._optimizer.layout
        places = layout.segments(optimizer.collectives.rank)
        wanted = {spec.name: (spec, place) for spec, place in zip(layout.params, places, strict=True)}
        names = set() if self._model is None else set(model_rest(self._model, optimizer)[0])
        same_ranks = manifest.world_size == self._group.world_size
        return stage(path, manifest, wanted, names, self._group.rank if same_ranks else None)

    def _apply(self, manifest: Manifest, fit: Fit, staged: Staged) -> None:
        """Write what was read. Only a model's own code can fail here, so that goes first."""
        if self._model is not None:
            on_all(self._group, lambda: _load_model(self._model, manifest, staged), _same_error)
        shards = {**self._optimizer.local_shards(), **staged.shards}
        self._optimizer.load_shards(shards, fit.groups)
        for restore in staged.rng:
            restore()


def _load_model(model: nn.Module | None, manifest: Manifest, staged: Staged) -> None:
    """Give the model its entries through its own `load_state_dict`, which copies in place and calls its hooks."""
    assert model is not None
    own = model.state_dict()
    known = {name: value for name, value in manifest.model_values.items() if name in own}
    rest: Any = type(own)({**staged.model, **known})
    # Modules read their own version from it.
    rest._metadata = getattr(own, "_metadata", None)
    model.load_state_dict(rest, strict=False)


def _problem(failures: Mapping[int, Failure], error: Exception | None) -> str:
    """What is wrong with a checkpoint, by rank. Raises what is no fault of the checkpoint."""
    for failure in failures.values():
        if failure.kind not in ("CheckpointCorrupt", "CheckpointError", "CheckpointNotFound"):
            raise _same_error(failures) from error
    return "; ".join(f"rank {rank}: {failure.text}" for rank, failure in failures.items())


def _same_error(failures: Mapping[int, Failure]) -> Exception:
    """The first failing rank's exception, for every rank."""
    rank, failure = next(iter(failures.items()))
    kind = getattr(errors, failure.kind, None)
    if isinstance(kind, type) and issubclass(kind, CheckpointError):
        return kind(failure.text)
    return CheckpointError(f"rank {rank}: {failure.kind}: {failure.text}")
