"""The node agent: supervises ranks and spares, owns the snapshot memory, decides recoveries. Imports neither torch nor lightning."""
