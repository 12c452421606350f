"""What drkl wrote into a folder, as against what other people put there: only the first is replaced or removed."""

from __future__ import annotations

import errno
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from drkl.errors import DrklError
from drkl.folders import sync, sync_tree
from drkl.runs import RunFolder
from drkl.training.checkpoints import own_checkpoints
from drkl.training.placing import discard, tidy

_MODEL = re.compile(
    r"(adapter_|generation_|tokenizer_)?config\.json|(adapter_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|"
    r"README\.md|tokenizer\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.jinja|"
    r"additional_chat_templates|vocab\.(json|txt|bpe)|merges\.txt|[a-z.]+\.(model|spm)"
)
"""Names in a saved model's folder: of its weights, its config, its tokenizer and its card."""
_FIGURES = re.compile(r"positions\.csv|[\w-]+\.svg")
"""Names in ``analysis/``."""


def put_in_place(made: Path, target: Path) -> None:
    """Give a model's folder its name, in the place of an earlier one; what other people put into that one moves over.

    Cut off in the midst, there is the earlier one, the new one, or the earlier one under the name
    ``.NAME.before``; the next call finishes that.

    Args:
        made: a finished folder beside ``target``.
        target: its name to be.

    Raises:
        OSError: it cannot be written to the disk, or not be moved.
    """
    before = target.parent / f".{target.name}.before"
    _finish(before, target)
    sync_tree(made)
    if os.path.lexists(target):
        if not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
        is_here = target.samefile(os.curdir)
        target.rename(before)
    else:
        is_here = False
    try:
        made.rename(target)
    except OSError:
        _finish(before, target)
        raise
    if is_here:
        os.chdir(target)
    sync(target.parent)
    _finish(before, target)


def _finish(before: Path, target: Path) -> None:
    if not before.is_dir():
        return
    if not os.path.lexists(target):
        before.rename(target)
        return
    for path in before.iterdir():
        if not (_MODEL.fullmatch(path.name) or os.path.lexists(target / path.name)):
            path.rename(target / path.name)
    shutil.rmtree(before, ignore_errors=True)


def remove_run(run: RunFolder) -> None:
    """Remove what drkl wrote into a run folder, its stages included.

    ``config.yaml`` stays, to be replaced: by it the folder is known as one that may be replaced, wherever this is cut
    off.

    Raises:
        DrklError: something cannot be removed.
    """
    try:
        _remove_files(run)
    except OSError as error:
        raise DrklError(f"Cannot replace {str(run.root)!r}: {error.strerror or error} ({error.filename}).") from error


def _remove_files(run: RunFolder) -> None:
    for stage in run.stages():
        _remove_files(stage)
        stage.config_path.unlink()
        _remove_if_empty(stage.root)
    _remove_if_empty(run.root / "stages")
    tidy(run.checkpoints_path)
    for checkpoint in own_checkpoints(run.checkpoints_path):
        discard(checkpoint)
    _remove_if_empty(run.checkpoints_path)
    for folder, names in ((run.student_path, _MODEL), (run.analysis_folder, _FIGURES)):
        for path in folder.iterdir() if folder.is_dir() else ():
            if names.fullmatch(path.name):
                _remove(path)
        _remove_if_empty(folder)
    for name in ("writing", "before"):
        _remove(run.root / f".{run.student_path.name}.{name}")
    _remove(run.parts_path)
    for path in (
        run.env_path, run.train_log_path, run.eval_path, run.samples_path, run.predictions_path, run.heldout_path,
        run.analysis_path, run.report_path, run.report_path.with_suffix(".md"), run.report_path.with_suffix(".csv"),
        run.eval_rows_path, run.rollouts_path,
    ):  # fmt: skip
        for left in (path, *run.root.glob(f".{path.name}.????????")):  # cut off in writing
            _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
