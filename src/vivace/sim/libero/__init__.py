"""LIBERO: the benchmark that most policies are compared on, driven through the same rollouts as the conveyor.

conventions  what openpi and LeRobot each do around the simulator (images, state, gripper, settling, step limits), as data
worker       the script that LIBERO's own interpreter runs: robosuite in, frames on a pipe out
client       that process seen from here
environment  one task as a `rollout.Simulator`; cameras are rendered only when a policy looks
expert       scripted pick and place from the true state, for the suite libero_object
campaign     suites, arms, blocks, counts

LIBERO's packages pin an old simulator (mujoco < 4), so they live in an environment of their own and never in this process
(docs/decisions/0009, docs/guides/libero.md).
"""
