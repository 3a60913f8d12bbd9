"""The edge where Ray is known: a cluster, tasks, resources."""
