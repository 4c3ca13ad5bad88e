"""The persistent tier: snapshots in `torch.distributed.checkpoint` format at any fsspec URL, written and read by a process of its own."""
