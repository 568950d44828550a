"""The processes of a plan: joining a run, exchanging values, serving batches, and naming the worker at fault."""
