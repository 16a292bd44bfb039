"""rewrite: put what was decided in the place of the attention it computes."""
