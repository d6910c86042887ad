"""Training: flow matching of the network that is served (`model.pi.Pi`), from demonstrations to a checkpoint folder.

config      a recipe (TOML) as records
frames      demonstrations as tensors: what one training example is
initialise  fresh weights
objective   the loss
learner     optimiser, moving average, save and resume
closed_loop episodes in the simulator: success rates, and more data where the policy gets to
export      checkpoint folders in LeRobot's, openpi's and JAX's format
loop        all of it in order
"""
