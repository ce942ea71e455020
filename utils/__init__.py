"""Running an experiment: configuration, training, checkpoints, logs, evaluation and reports."""
