"""Code generation: from a spec and the data of its mask to something that runs."""
