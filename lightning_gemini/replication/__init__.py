"""Snapshots on other nodes: agents send them to each other, keep replicas of them, and bring them back. No torch here, no pickle."""
