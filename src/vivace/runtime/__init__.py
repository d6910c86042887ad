"""Joins checkpoint, robot, model and backend into a policy; wall-clock behaviour."""
