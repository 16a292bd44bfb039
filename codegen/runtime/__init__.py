"""Generated text on disk, as modules, and launched."""
