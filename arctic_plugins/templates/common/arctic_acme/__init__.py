"""The plugin ``acme`` for arctic-plugins."""
