"""decide: from a site and its mask to what runs in its place."""
