"""Recovery: detect, decide, regroup, restore, resume. `plan` is pure and used by the agent; the rest runs in the ranks."""
