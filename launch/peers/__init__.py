"""The rivals of a benchmark: other ways to train the same model on the same batches, run by their own code.

    run_ddp             DistributedDataParallel: every rank has the whole model and a slice of each batch
    run_torch_schedule  torch.distributed.pipelining: every rank has some layers and sees all microbatches

Same initial weights, batches, optimizer and threads as our own rows, in fresh processes that talk over gloo.
"""

from launch.peers.best import MicrobatchChoice, best_microbatches
from launch.peers.ddp import DDP, run_ddp
from launch.peers.loop import Rival, Training
from launch.peers.placement import SCHEDULES
from launch.peers.rank_process import RankProcess, Seat
from launch.peers.ranks import HERE, Hear, Places
from launch.peers.record import PeerRun, Said
from launch.peers.torch_schedule import TorchSchedule, run_torch_schedule

__all__ = [
    "DDP",
    "HERE",
    "SCHEDULES",
    "Hear",
    "MicrobatchChoice",
    "PeerRun",
    "Places",
    "RankProcess",
    "Rival",
    "Said",
    "Seat",
    "TorchSchedule",
    "Training",
    "best_microbatches",
    "run_ddp",
    "run_torch_schedule",
]
