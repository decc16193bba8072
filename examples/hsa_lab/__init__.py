"""What the commands of `examples` are made of: tasks, training, evaluation, benchmarks, and what these share."""
