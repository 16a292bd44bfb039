"""From a captured graph to one with sparse attention; ``pipeline`` says how."""
