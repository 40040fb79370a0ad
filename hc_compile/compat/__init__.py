"""Drop-ins for other hyper-connection packages: their names, on this implementation."""
