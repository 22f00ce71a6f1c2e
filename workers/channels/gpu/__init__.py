"""Channels between GPUs: CUDA peer memory and NCCL."""
