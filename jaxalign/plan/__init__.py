"""What a run needs, before the machines for it are rented: see `jaxalign.plan.run`."""
