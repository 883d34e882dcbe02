"""A seven-joint arm of primitives in MuJoCo, its tasks and scripted experts."""
