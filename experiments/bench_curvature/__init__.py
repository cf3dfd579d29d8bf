"""What curvature costs, ours and other libraries', in units of a training step."""
