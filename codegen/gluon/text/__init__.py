"""Templates of the forward on Hopper, in Gluon: warps that load, and warpgroups that multiply."""
