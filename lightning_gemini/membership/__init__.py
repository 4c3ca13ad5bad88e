"""Who is in the job, and what has been decided: on one node in the agent itself, on several in etcd."""
