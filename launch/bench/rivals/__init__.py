"""The rivals of a benchmark: other ways to train the same model on the same batches, run by their own code.

Same initial weights, batches, optimizer and threads as our own rows, in fresh processes that talk over gloo.
"""

from launch.bench.rivals.ddp import DDP, run_ddp
from launch.bench.rivals.loop import Rival, Training
from launch.bench.rivals.placement import TORCH_SCHEDULES
from launch.bench.rivals.rank_process import RankProcess, Seat
from launch.bench.rivals.ranks import HERE, Hear, Places
from launch.bench.rivals.record import RivalRun, Said
from launch.bench.rivals.torch_schedule import TorchSchedule, best_microbatches, run_torch_schedule

__all__ = [
    "DDP",
    "HERE",
    "TORCH_SCHEDULES",
    "Hear",
    "Places",
    "RankProcess",
    "Rival",
    "RivalRun",
    "Said",
    "Seat",
    "TorchSchedule",
    "Training",
    "best_microbatches",
    "run_ddp",
    "run_torch_schedule",
]
