"""What a snapshot is: the catalogue of tensors, who owns which bytes, and the rank-local rest."""
