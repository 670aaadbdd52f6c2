"""How good a policy is: accuracy on held-out problems."""
