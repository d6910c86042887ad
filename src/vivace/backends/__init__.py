"""How the one forward is executed."""
