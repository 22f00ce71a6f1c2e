"""Who starts the workers, and what the user types and sees."""

from launch.result import Result
from launch.training import train
from workers.failures import RunFailed

__all__ = ["Result", "RunFailed", "train"]
