"""Models of other libraries, changed in place: their hyper-connections replaced, or made."""
