"""What is known of an attention in a graph: site, mask, plan."""
