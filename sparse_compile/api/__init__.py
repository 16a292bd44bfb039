"""What users call: attention(), select(), native_sparse_attention(), mask()."""
