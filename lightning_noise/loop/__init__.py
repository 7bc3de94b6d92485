"""The training loop of Lightning: its private names, the dispatchers, progress, snapshots and loggers."""
