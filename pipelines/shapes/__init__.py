"""A world of plain shapes in which it can be said exactly whether a picture shows what its caption says."""
