"""laplace-torch's own test suite, run through `laplace_ws.compat.laplace_torch`."""
