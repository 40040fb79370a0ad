"""Models of other libraries, with their hyper-connections replaced in place."""
