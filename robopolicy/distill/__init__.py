"""Distillation: a student that asks its network once learns what a teacher does in many calls."""
