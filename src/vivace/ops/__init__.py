"""Where the time goes: the table of operations that the model is given."""
