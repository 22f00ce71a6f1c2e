"""Ready-made sweeps: the questions that unlocked training raises, as options. What is typed besides comes on top."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from pipeline import PlanError, nearest

__all__ = ["PRESETS", "with_preset"]

PRESETS: dict[str, str] = {
    "stages": "--vary stages=1,2,3,6 --hop-steps 1",
    "hops": "--vary hop-steps=0,1,8 --stages 6 --row 'backpropagation: --mode naive' --row 'unlocked:' "
    "--row 'async-1f1b, waiting: --mode async-1f1b' "
    "--row 'async-1f1b, kept full: --mode async-1f1b --in-flight full'",
    "rivals": "--stages 6 --hop-steps 1 --row 'backpropagation: --mode naive' --row 'unlocked:' "
    "--row 'async-1f1b: --mode async-1f1b' --row 'async-1f1b, warm-up: --mode async-1f1b --optimizer.warmup-steps 200' "
    "--row 'async-1f1b-nadamw: --mode async-1f1b --optimizer.rule nadamw --optimizer.warmup-steps 200' "
    "--row 'backpropagation, nadamw: --mode naive --optimizer.rule nadamw --optimizer.warmup-steps 200' "
    "--row 'unlocked after 200 batches: --warmup-steps 200' --row 'unlocked, auto: --unlock auto'",
    "paper": "--vary layers,stages=3,4,5,6 --row 'backpropagation: --mode naive' "
    "--row 'DNI: --dni.form linear --dni.no-labels' --row 'cDNI: --dni.form linear' "
    "--row 'cDNI, true targets: --dni.form linear --targets true' "
    "--row 'cDNI, p = 0.2: --dni.form linear --update-probability 0.2' "
    "--row 'loss_model: --dni.form loss_model' "
    "--row 'loss_model, p = 0.2: --dni.form loss_model --update-probability 0.2' "
    "--row 'label_residual: --dni.form label_residual' "
    "--row 'label_residual, p = 0.2: --dni.form label_residual --update-probability 0.2'",
    "dni-size": "--vary dni.hidden=16,64,256,1024 --stages 6 --hop-steps 1 --row 'backpropagation: --mode naive' "
    "--row 'mlp: --dni.form mlp' --row 'loss_model: --dni.form loss_model'",
    "batch-norm": "--vary batch-norm=true,false --stages 6 --hop-steps 1 --row 'backpropagation: --mode naive' "
    "--row 'bootstrap:' --row 'true: --targets true'",
}
"""Options by name."""


def with_preset(arguments: Sequence[str]) -> list[str]:
    """The arguments with those of ``--preset`` in front of them.

    Raises:
        PlanError: no such preset.
    """
    for index, argument in enumerate(arguments):
        option, equals, name = argument.partition("=")
        if option == "--preset":
            name = name if equals else next(iter(arguments[index + 1 :]), "")
            if name not in PRESETS:
                raise PlanError(nearest(name, PRESETS, "preset"))
            return [*shlex.split(PRESETS[name]), *arguments]
    return list(arguments)
