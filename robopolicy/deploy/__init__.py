"""From a checkpoint to a robot: exported graphs, the engine and its executors, the safety filter."""
