"""Gates that learn to select; never on the compile path."""
