"""The rivals of a benchmark: other ways to train the same model on the same batches, run by their own code.

    run_ddp             DistributedDataParallel: every rank has the whole model and a slice of each batch
    run_torch_schedule  torch.distributed.pipelining: every rank has some layers and sees all microbatches

Same initial weights, batches, optimizer and threads as our own rows, in fresh processes that talk over gloo.
"""

from launch.peers.best import MicrobatchChoice, best_microbatches
from launch.peers.ddp import run_ddp
from launch.peers.placement import SCHEDULES
from launch.peers.record import PeerRun
from launch.peers.torch_schedule import run_torch_schedule

__all__ = ["SCHEDULES", "MicrobatchChoice", "PeerRun", "best_microbatches", "run_ddp", "run_torch_schedule"]
