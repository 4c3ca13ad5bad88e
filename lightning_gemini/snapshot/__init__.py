"""Snapshots: capture -> shared memory -> commit -> restore. `slots` and `collective_log` are plain bytes and used by the agent too."""
