"""hypothesis strategies for tensors, trees, modules, optimizers, tasks and losses: legal by default."""

__all__: list[str] = []
