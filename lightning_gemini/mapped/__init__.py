"""Batches in memory that outlives a rank: a loader process per data stream, and ranks that attach to it."""
